"""Rewards that are the cosine of an image and its prompt in a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.clip import BLOCKS
from sqdf_fast.rewards.preprocess import preprocess
from sqdf_fast.rewards.text_features import ConstantFeatures, PromptFeatures

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection


class CosineReward(Reward):
    """r(x, c) = (e / |e|) . (f / |f|), e and f the embeddings of image and prompt.

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        prompts: normalized text features [B, F] of B prompts, float32 or float64; the score is of that dtype.
    """

    checkpointed_block_types = BLOCKS

    def __init__(self, vision: CLIPVisionModelWithProjection, prompts: PromptFeatures | ConstantFeatures) -> None:
        super().__init__()
        self.vision, self.prompts = vision, prompts
        self.size: int = vision.config.image_size

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        self.prompts.encode(prompts)

    def drop_text_tower(self) -> None:
        self.prompts.drop_tower()

    def pixels(self, images: Tensor) -> Tensor:
        """What the image tower sees of images in [0, 1]: [B, 3, size, size], float32 or float64."""
        return preprocess(images, self.size)

    def features(self, images: Tensor) -> Tensor:
        """Normalized image embeddings, [B, F]."""
        pixels = self.pixels(images).to(self.vision.dtype)
        embeddings = self.vision(pixel_values=pixels).image_embeds.to(self.prompts.dtype)
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.features(images)
        return (features * self.prompts(prompts, features.device)).sum(dim=-1)
