"""discounted_loss on the CPU through the native library: the raw forward of op.py, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels import native
from sqdf_fast.kernels.native import unavailable

__all__ = ["forward", "unavailable"]


def forward(
    reward: Tensor,
    kl: Tensor,
    remaining: Tensor,
    gamma: float,
    alpha: float,
    mask_nonpositive: bool,
    denominator: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss float32 [], d loss / d reward and d loss / d kl float32 like reward."""
    reward, kl = reward.to(torch.float32).contiguous(), kl.to(torch.float32).contiguous()
    remaining = remaining.contiguous()
    loss = reward.new_empty(())
    grad_reward = reward.new_empty(reward.shape)
    grad_kl = reward.new_empty(reward.shape)
    native.function("sqdf_fast_discounted_loss", "ppplddidppp")(
        reward.data_ptr(),
        kl.data_ptr(),
        remaining.data_ptr(),
        reward.numel(),
        gamma,
        alpha,
        mask_nonpositive,
        denominator,
        loss.data_ptr(),
        grad_reward.data_ptr(),
        grad_kl.data_ptr(),
    )
    return loss, grad_reward, grad_kl
