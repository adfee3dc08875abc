"""How much better than its fellows a sample is: what a gradient-free reward is learnt from."""

from __future__ import annotations

from torch import Tensor


def advantages(rewards: Tensor, group: int, *, clip: float, epsilon: float, pooled: bool = False) -> Tensor:
    """(r - mean) / (std + epsilon) within +- ``clip``; mean and (population) standard deviation are of the group.

    Args:
        rewards: [n] of one collection, those of a group next to each other.
        group: samples a group, a divisor of n; 1: the whole collection is one group.
        epsilon: keeps equal rewards at an advantage of 0.
        pooled: the standard deviation is of the whole collection, the mean of the group all the same.

    Returns:
        [n] in the rewards' dtype.
    """
    groups = rewards.view(1, -1) if group == 1 else rewards.view(-1, group)
    deviation = rewards.std(correction=0) if pooled else groups.std(dim=1, correction=0, keepdim=True)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (deviation + epsilon)).flatten().clamp(-clip, clip)
