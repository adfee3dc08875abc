"""Taste: the learned reward of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sqdf_fast.rewards.base import Reward


class TasteReward(Reward):
    """A small network trained on few, noisy ratings of a rule that stays hidden from it; 64 x 64 pictures.

    Its distance to the rule is what reward over-optimisation exploits. The prompt is not read.
    """

    name = "taste"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        from sqdf_fast.shapes import load_taste

        # Too small for half precision to save anything.
        self.network = load_taste().to(torch.promote_types(dtype, torch.float32))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network(images.to(next(self.network.parameters()).dtype), prompts)
