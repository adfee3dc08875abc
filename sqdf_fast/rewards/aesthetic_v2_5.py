"""Aesthetic Predictor V2.5: a linear head on SigLIP image embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqdf_fast.rewards.architectures import architecture, empty, pretrained
from sqdf_fast.rewards.base import exact
from sqdf_fast.rewards.head import HeadReward
from sqdf_fast.rewards.preprocess import stretch
from sqdf_fast.rewards.published import PublishedFile

SIGLIP = "google/siglip-so400m-patch14-384"
HEAD_FILE = "aesthetic_predictor_v2_5.pth"
_SOURCE = "github.com/discus0434/aesthetic-predictor-v2-5"
HEAD = f"https://{_SOURCE}/raw/main/models/{HEAD_FILE}"


class AestheticV25Reward(HeadReward):
    """Aesthetic score of Aesthetic Predictor V2.5, about 1 to 10; above 5.5 its author calls an image great.

    r(x) = w . e / |e| + b, e = pooled SigLIP image embedding of x; w and b are the published head.
    Source: github.com/discus0434/aesthetic-predictor-v2-5. SigLIP's text tower is not loaded.
    """

    name = "aesthetic-v2.5"
    checkpointed_block_types = frozenset({"SiglipEncoderLayer"})
    file = PublishedFile(name, "head", HEAD_FILE, _SOURCE)
    layers = tuple(f"scoring_head.{position}" for position in (0, 2, 4, 6, 8))
    backbone = SIGLIP

    @classmethod
    def load(cls, siglip: str = SIGLIP, head: str = HEAD, dtype: torch.dtype = torch.float32) -> AestheticV25Reward:
        """The published weights.

        Args:
            siglip: folder or hub id of the SigLIP model in transformers' format.
            head: the published ``.pth``, its tensors as ``.safetensors``, a folder with it, a hub id, or its address.
            dtype: of the vision network; the head and the score are float32 (float64 with float64).

        Raises:
            UserError: a model that cannot be found or is of another architecture.
        """
        from transformers import SiglipVisionModel

        vision = pretrained(
            SiglipVisionModel, siglip, dtype, reward=cls.name, option="siglip", published=SIGLIP, kind="SigLIP"
        )
        return cls(vision, cls.load_head(head, cls.file, vision.config.hidden_size, siglip, dtype))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> AestheticV25Reward:
        """The same modules with random weights, from the shipped configuration."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(**architecture("siglip-so400m-patch14-384", "vision_config"))
        vision = empty(SiglipVisionModel, config, device=device, dtype=dtype)
        return cls(vision, nn.Linear(config.hidden_size, 1, device=device, dtype=exact(dtype)))

    def embed(self, images: Tensor) -> Tensor:
        return self.vision(pixel_values=stretch(images, self.size).to(self.vision.dtype)).pooler_output
