"""Advantages: the learning signal of the gradient-free algorithms."""

from __future__ import annotations

from torch import Tensor


def advantages(rewards: Tensor, group: int, *, clip: float, epsilon: float, pooled: bool = False) -> Tensor:
    """(r - mean) / (std + epsilon) within +- ``clip``; mean and (population) standard deviation are of the group.

    Args:
        rewards: [n] of one collection, consecutive within a group.
        group: samples per group, a divisor of n; 1: one group of all.
        epsilon: keeps equal rewards at an advantage of 0.
        pooled: whether the standard deviation is that of all rewards; the mean stays the group's.

    Returns:
        [n] in the rewards' dtype.
    """
    groups = rewards.view(1, -1) if group == 1 else rewards.view(-1, group)
    deviation = rewards.std(correction=0) if pooled else groups.std(dim=1, correction=0, keepdim=True)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (deviation + epsilon)).flatten().clamp(-clip, clip)
