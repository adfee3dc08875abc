"""The LAION aesthetic score: a linear head on CLIP ViT-L/14 image embeddings."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sqdf_fast.rewards.architectures import pretrained
from sqdf_fast.rewards.base import exact
from sqdf_fast.rewards.clip import BLOCKS, VIT_L_14, vision_tower
from sqdf_fast.rewards.head import HeadReward
from sqdf_fast.rewards.preprocess import preprocess
from sqdf_fast.rewards.published import PublishedFile

HEAD = "camenduru/improved-aesthetic-predictor"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticReward(HeadReward):
    """Aesthetic score, version 2 ("sac+logos+ava1-l14-linearMSE"), about 1 to 10.

    r(x) = w . e / |e| + b, e = CLIP image embedding of x; w and b are the published head.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor. CLIP's text tower is not loaded.
    """

    name = "aesthetic"
    checkpointed_block_types = BLOCKS
    file = PublishedFile(name, "head", HEAD_FILE, "github.com/christophschuhmann/improved-aesthetic-predictor")
    layers = tuple(f"layers.{position}" for position in (0, 2, 4, 6, 7))
    backbone = VIT_L_14

    @classmethod
    def load(
        cls, clip: str = VIT_L_14, head: str = HEAD, head_file: str = HEAD_FILE, dtype: torch.dtype = torch.float32
    ) -> AestheticReward:
        """The published weights.

        Args:
            clip: folder or hub id of the CLIP model in transformers' format.
            head: the published ``.pth``, its tensors as ``.safetensors``, a folder with it, or a hub id.
            head_file: the file's name in that folder or repository.
            dtype: of the vision network; the head and the score are float32 (float64 with float64).

        Raises:
            UserError: a model that cannot be found or is of another architecture.
        """
        from transformers import CLIPVisionModelWithProjection

        vision = pretrained(
            CLIPVisionModelWithProjection, clip, dtype, reward=cls.name, option="clip", published=VIT_L_14
        )
        file = replace(cls.file, filename=head_file)
        return cls(vision, cls.load_head(head, file, vision.config.projection_dim, clip, dtype))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> AestheticReward:
        """The same modules with random weights, from the shipped configuration."""
        vision = vision_tower("clip-vit-large-patch14", device=device, dtype=dtype)
        return cls(vision, nn.Linear(vision.config.projection_dim, 1, device=device, dtype=exact(dtype)))

    def embed(self, images: Tensor) -> Tensor:
        return self.vision(pixel_values=preprocess(images, self.size).to(self.vision.dtype)).image_embeds
