"""CLIPScore: how well an image fits its prompt, in the CLIP that was never tuned for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqdf_fast.rewards.clip import load_text_tower, load_vision_tower, vision_tower
from sqdf_fast.rewards.cosine import CosineReward
from sqdf_fast.rewards.text_features import (
    ConstantFeatures,
    PromptFeatures,
    TextTower,
    check_tokenizer,
    load_clip_tokenizer,
    unescaped,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

MODEL = "openai/clip-vit-large-patch14"
# w of Hessel et al. (arXiv 2104.08718), section 3.
WEIGHT = 2.5


class CLIPScoreReward(CosineReward):
    """CLIPScore, typically 0.4 to 0.9 with ViT-L/14.

    r(x, c) = 2.5 (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in OpenAI's CLIP. Hessel et al.
    (arXiv 2104.08718) cut it off below 0, where it would have no gradient; ``clamp`` does so, for comparing judges'
    numbers with published ones.

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        prompts: normalized text features [B, F] of B prompts, float32 or float64; the score is of that dtype.
        clamp: cut negative scores off.
    """

    name = "clip"

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        prompts: PromptFeatures | ConstantFeatures,
        clamp: bool = False,
    ) -> None:
        super().__init__(vision, prompts)
        self.clamp = clamp

    @classmethod
    def load(
        cls,
        model: str = MODEL,
        tokenizer: str | None = None,
        prefix: str = "",
        clamp: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> CLIPScoreReward:
        """The published weights.

        Args:
            model: folder or hub id of a CLIP model in transformers' format; the paper's is ViT-B/32.
            tokenizer: folder or hub id of its tokenizer; default: that of ``model``.
            prefix: put before each prompt, with a space; the paper's for captions is "A photo depicts". Prompts for
                images say what kind of image they want, so that there is none here.
            clamp: max(r, 0), as published.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: a model or a tokenizer that cannot be found or is of another architecture.
        """
        exact = torch.promote_types(dtype, torch.float32)
        words = load_clip_tokenizer(tokenizer or model, reward=cls.name, published=MODEL)
        vision = load_vision_tower(model, dtype, reward=cls.name, published=MODEL, option="model")
        reload = partial(_text_tower, model, words, prefix, exact)
        return cls(vision, PromptFeatures(reload(), reload), clamp)

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> CLIPScoreReward:
        """The image tower with random weights, from the shipped configuration; one vector for every prompt."""
        vision = vision_tower("clip-vit-large-patch14", device=device, dtype=dtype)
        return cls(vision, ConstantFeatures(vision.config.projection_dim, torch.promote_types(dtype, torch.float32)))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = WEIGHT * super().forward(images, prompts)
        return scores.clamp(min=0) if self.clamp else scores


def _text_tower(model: str, tokenizer: CLIPTokenizer, prefix: str, dtype: torch.dtype) -> TextTower:
    network = load_text_tower(model, dtype, reward=CLIPScoreReward.name, published=MODEL, option="model")
    check_tokenizer(tokenizer, network, reward=CLIPScoreReward.name, published=MODEL)
    return TextTower(network, tokenizer, partial(_prefixed, prefix))


def _prefixed(prefix: str, prompt: str) -> str:
    return unescaped(f"{prefix} {prompt}")
