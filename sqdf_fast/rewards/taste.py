"""Taste: the learned reward of the embedded world, and a second one that judges the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqdf_fast.rewards.base import Reward, exact


class TasteReward(Reward):
    """A small network trained on few, noisy ratings of a rule that stays hidden from it; 64 x 64 images.

    Its distance to the rule is what reward over-optimization exploits. The prompt is not read.

    Args:
        network: images and prompts to [B].
    """

    name = "taste"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> TasteReward:
        """The shipped network, in float32 at least: it is too small for half precision to save anything."""
        from sqdf_fast.shapes import load_taste

        return cls(load_taste(cls.name).to(exact(dtype)))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> TasteReward:
        """The same network with random weights."""
        from sqdf_fast.shapes.rewards import TasteNetwork

        with torch.device(device):
            return cls(TasteNetwork().to(exact(dtype)))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network(images.to(next(self.network.parameters()).dtype), prompts)


class HeldOutTasteReward(TasteReward):
    """A network as `TasteReward`'s, trained on other ratings of the same rule from another seed.

    It judges runs that are trained on ``taste``; what both networks get wrong it cannot see.
    """

    name = "taste-held-out"
