"""CLIPScore: how well an image fits its prompt, in the CLIP that was never tuned for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqdf_fast.rewards.clip import VIT_L_14, CosineReward
from sqdf_fast.rewards.text_features import ConstantFeatures, PromptFeatures, unescaped

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

# w of Hessel et al. (arXiv 2104.08718), section 3.
WEIGHT = 2.5


class CLIPScoreReward(CosineReward):
    """CLIPScore, typically 0.4 to 0.9 with ViT-L/14.

    r(x, c) = 2.5 (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in OpenAI's CLIP. Hessel et al.
    (arXiv 2104.08718) cut it off below 0, where it would have no gradient; ``clamp`` does so, for comparing judges'
    numbers with published ones.

    Args:
        vision, prompts: as for :class:`CosineReward`.
        clamp: whether negative scores are cut off.
    """

    name = "clip"
    model = VIT_L_14
    config = "clip-vit-large-patch14"

    def __init__(
        self, vision: CLIPVisionModelWithProjection, prompts: PromptFeatures | ConstantFeatures, clamp: bool = False
    ) -> None:
        super().__init__(vision, prompts)
        self.clamp = clamp

    @classmethod
    def load(
        cls,
        model: str = VIT_L_14,
        tokenizer: str | None = None,
        prefix: str = "",
        clamp: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> CLIPScoreReward:
        """The published weights.

        Args:
            model: folder or hub id of a CLIP model in transformers' format; the paper's is ViT-B/32.
            tokenizer: folder or hub id of its tokenizer; default: that of ``model``.
            prefix: text before each prompt, with a space; the paper's for captions is "A photo depicts". Prompts for
                images say what kind of image they want, so that the default is empty.
            clamp: max(r, 0), as published.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: a model or a tokenizer that cannot be found or is of another architecture.
        """
        return cls(*cls.towers(model, tokenizer, dtype, lambda prompt: unescaped(f"{prefix} {prompt}")), clamp)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = WEIGHT * super().forward(images, prompts)
        return scores.clamp(min=0) if self.clamp else scores
