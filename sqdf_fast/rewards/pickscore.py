"""PickScore: the scaled cosine of an image and its prompt in a CLIP that was fine-tuned on human choices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqdf_fast.rewards.clip import load_logit_scale, load_text_tower, load_vision_tower, vision_tower
from sqdf_fast.rewards.cosine import CosineReward
from sqdf_fast.rewards.text_features import (
    ConstantFeatures,
    PromptFeatures,
    TextTower,
    check_tokenizer,
    load_clip_tokenizer,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

MODEL = "yuvalkirstain/PickScore_v1"
# OpenCLIP's ViT-H/14, of which HPSv2 is another fine-tuning.
_CONFIG = "hpsv2"


class PickScoreReward(CosineReward):
    """PickScore, typically 15 to 25; it compares images of one prompt.

    r(x, c) = s (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in a fine-tuned ViT-H/14, s = exp of
    its learned logit scale. Source: github.com/yuvalkirstain/PickScore (arXiv 2305.01569).

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        prompts: normalized text features [B, F] of B prompts, float32 or float64; the score is of that dtype.
        scale: s, a number.
    """

    name = "pickscore"

    def __init__(
        self, vision: CLIPVisionModelWithProjection, prompts: PromptFeatures | ConstantFeatures, scale: Tensor
    ) -> None:
        super().__init__(vision, prompts)
        self.scale: Tensor
        self.register_buffer("scale", scale)

    @classmethod
    def load(
        cls, model: str = MODEL, tokenizer: str | None = None, dtype: torch.dtype = torch.float32
    ) -> PickScoreReward:
        """The published weights.

        Args:
            model: folder or hub id of the model in transformers' format.
            tokenizer: folder or hub id of CLIP's tokenizer; default: that of ``model``.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: a model or a tokenizer that cannot be found or is of another architecture.
        """
        exact = torch.promote_types(dtype, torch.float32)
        words = load_clip_tokenizer(tokenizer or model, reward=cls.name, published=MODEL)
        where = {"reward": cls.name, "published": MODEL, "option": "model"}
        vision = load_vision_tower(model, dtype, **where)
        scale = load_logit_scale(model, exact, **where)
        prompts = PromptFeatures(_text_tower(model, words, exact), partial(_text_tower, model, words, exact))
        return cls(vision, prompts, scale)

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> PickScoreReward:
        """The image tower with random weights, from the shipped configuration; one vector for every prompt."""
        vision = vision_tower(_CONFIG, device=device, dtype=dtype)
        exact = torch.promote_types(dtype, torch.float32)
        scale = torch.full((), 100.0, device=device, dtype=exact)
        return cls(vision, ConstantFeatures(vision.config.projection_dim, exact), scale)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * super().forward(images, prompts)


def _text_tower(model: str, tokenizer: CLIPTokenizer, dtype: torch.dtype) -> TextTower:
    network = load_text_tower(model, dtype, reward=PickScoreReward.name, published=MODEL, option="model")
    check_tokenizer(tokenizer, network, reward=PickScoreReward.name, published=MODEL)
    return TextTower(network, tokenizer, clean=str)
