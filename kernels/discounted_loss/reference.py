"""discounted_loss in plain PyTorch: the meaning of the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sqdf_fast.kernels.validation import math_dtype


class Forward(NamedTuple):
    """Arguments of the loss; reward, kl, remaining: [B] or [K, B]."""

    reward: Tensor
    kl: Tensor
    remaining: Tensor
    gamma: float
    alpha: float
    mask_nonpositive: bool
    denominator: float


def forward(given: Forward) -> Tensor:
    """The loss, differentiable with respect to reward and kl.

    In float64, which costs nothing for so few numbers; float32 (float64 when an input is float64) is the result.
    """
    reward, kl, remaining, gamma, alpha, mask_nonpositive, denominator = given
    reward_scale = torch.pow(gamma, remaining.double()) / denominator
    loss = (alpha / denominator) * kl.double() - reward_scale * reward
    if mask_nonpositive:
        loss = torch.where(reward <= 0, torch.zeros_like(loss), loss)
    return loss.sum().to(math_dtype(reward, kl))
