"""Rewards as judges: the trained one, and those that training never sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.evaluate.judge import ImageJudge
from sqdf_fast.rewards import Reward, checked_reward, load_reward


class RewardJudge(ImageJudge):
    """The mean score of a reward.

    Args:
        owns_reward: whether the reward is this judge's alone, to be moved to the images' device and back.
    """

    def __init__(self, name: str, reward: Reward, *, owns_reward: bool) -> None:
        self.name, self.reward = name, reward
        self.network = reward if owns_reward else None

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        self.reward.encode_prompts(prompts)
        self.reward.drop_text_tower()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checked_reward(self.reward, images, prompts)


class ClipAlignment(RewardJudge):
    """Alignment of image and prompt by the reward ``clip``, the cosine of CLIP's embeddings.

    Hessel et al., "CLIPScore", arXiv 2104.08718.
    """

    # An image costs a pass through the image tower each time.
    exchanges = 1

    @classmethod
    def load(cls, *, dtype: torch.dtype = torch.float32, **options: Any) -> ClipAlignment:
        return cls("alignment", load_reward("clip", dtype=dtype, **options), owns_reward=True)


def held_out_judge(spec: str, *, dtype: torch.dtype, **options: Any) -> RewardJudge:
    """A reward that training does not see; its judge is called ``held_out_`` and what of ``spec`` a key can hold.

    Raises:
        UserError: as :func:`sqdf_fast.rewards.load_reward`.
    """
    name = re.sub(r"\W+", "_", spec).strip("_")
    return RewardJudge(f"held_out_{name}", load_reward(spec, dtype=dtype, **options), owns_reward=True)
