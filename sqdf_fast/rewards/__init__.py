"""Rewards: one file each, one registry, one differentiable preprocessing."""

from __future__ import annotations

from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.checks import checked_reward, preflight
from sqdf_fast.rewards.preprocess import saturate
from sqdf_fast.rewards.registry import available_rewards, load_reward, reward_from_config
from sqdf_fast.rewards.weighted import WeightedSum

__all__ = [
    "Reward",
    "WeightedSum",
    "available_rewards",
    "checked_reward",
    "load_reward",
    "preflight",
    "reward_from_config",
    "saturate",
]
