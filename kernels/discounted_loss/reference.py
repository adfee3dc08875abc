"""discounted_loss in plain PyTorch: the meaning of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.validation import math_dtype


def discounted_loss(
    reward: Tensor,
    kl: Tensor,
    remaining: Tensor,
    gamma: float,
    alpha: float,
    mask_nonpositive: bool,
    denominator: float,
) -> Tensor:
    """reward, kl, remaining [B] or [K, B] -> scalar, differentiable with respect to reward and kl."""
    dtype = math_dtype(reward, kl)
    weight = torch.pow(gamma, remaining.to(dtype))
    loss = alpha * kl.to(dtype) - weight * reward.to(dtype)
    if mask_nonpositive:
        loss = torch.where(reward <= 0, torch.zeros_like(loss), loss)
    return loss.sum() / denominator
