"""Held-out taste: a second learned reward of the embedded world, a judge of the first."""

from __future__ import annotations

import torch

from sqdf_fast.rewards.taste import TasteReward


class HeldOutTasteReward(TasteReward):
    """A network as `TasteReward`'s, trained on other ratings of the same rule from another seed.

    It judges runs that are trained on ``taste``; what the two agree on beyond the rule it cannot tell.
    """

    name = "taste-held-out"

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> HeldOutTasteReward:
        """The shipped network, in float32 at least."""
        from sqdf_fast.shapes import load_taste

        return cls(load_taste(cls.name).to(torch.promote_types(dtype, torch.float32)))
