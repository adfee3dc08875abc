"""Aesthetic Predictor V2.5: a linear head on SigLIP image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.aesthetic import fold_head
from sqdf_fast.rewards.architectures import architecture, empty, pretrained
from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.preprocess import stretch
from sqdf_fast.rewards.published import PublishedFile

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

SIGLIP = "google/siglip-so400m-patch14-384"
HEAD_FILE = "aesthetic_predictor_v2_5.pth"
_SOURCE = "github.com/discus0434/aesthetic-predictor-v2-5"
HEAD = f"https://{_SOURCE}/raw/main/models/{HEAD_FILE}"
# The Linear layers of the published Sequential; the others are dropout, idle at inference.
_LINEAR = tuple(f"scoring_head.{position}" for position in (0, 2, 4, 6, 8))


class AestheticV25Reward(Reward):
    """Aesthetic score of Aesthetic Predictor V2.5, about 1 to 10; above 5.5 its author calls an image great.

    r(x) = w . e / |e| + b, e = pooled SigLIP image embedding of x; w and b are the published head, five Linear layers
    without activation, multiplied out. Source: github.com/discus0434/aesthetic-predictor-v2-5. The prompt is not read,
    and SigLIP's text tower is not loaded.

    Args:
        vision: image tower with its pooling head; its dtype is that of the network's arithmetic.
        head: from its embeddings to one number, float32 or float64; the score is of that dtype.
    """

    name = "aesthetic-v2.5"
    checkpointed_block_types = frozenset({"SiglipEncoderLayer"})

    def __init__(self, vision: SiglipVisionModel, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.head = vision, head
        self.size: int = vision.config.image_size

    @classmethod
    def load(cls, siglip: str = SIGLIP, head: str = HEAD, dtype: torch.dtype = torch.float32) -> AestheticV25Reward:
        """The published weights.

        Args:
            siglip: folder or hub id of the SigLIP model in transformers' format.
            head: the published ``.pth``, the same tensors as ``.safetensors``, a folder that holds the file, the id of
                a hub repository, or its address.
            dtype: of the vision network; the head and the score are float32 (float64 with float64).

        Raises:
            UserError: a model that cannot be found or is of another architecture.
        """
        from transformers import SiglipVisionModel

        vision = pretrained(
            SiglipVisionModel, siglip, dtype, reward=cls.name, option="siglip", kind="SigLIP", published=SIGLIP
        )
        published = PublishedFile(cls.name, "head", "head", HEAD_FILE, _SOURCE)
        path = published.find(head)
        folded = fold_head(published.read(path), path, _LINEAR, reward=cls.name, filename=HEAD_FILE)
        width = vision.config.hidden_size
        if width != folded.in_features:
            raise UserError(
                f"{cls.name} reward: {siglip} gives embeddings of {width} numbers but the head {head} "
                f"reads {folded.in_features}; the published head belongs to {SIGLIP}"
            )
        return cls(vision, folded.to(torch.promote_types(dtype, torch.float32)))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> AestheticV25Reward:
        """The same modules with random weights, from the shipped configuration."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(**architecture("siglip-so400m-patch14-384", "vision_config"))
        vision = empty(SiglipVisionModel, config, device=device, dtype=dtype)
        exact = torch.promote_types(dtype, torch.float32)
        return cls(vision, nn.Linear(config.hidden_size, 1, device=device, dtype=exact))

    def features(self, images: Tensor) -> Tensor:
        """Normalized SigLIP image embeddings, [B, 1152]."""
        pixels = stretch(images, self.size).to(self.vision.dtype)
        embeddings = self.vision(pixel_values=pixels).pooler_output.to(self.head.weight.dtype)
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.features(images)).squeeze(-1)
