"""discounted_loss on CUDA: one program, one launch, the loss and both gradients."""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
from torch import Tensor

from sqdf_fast.kernels.discounted_loss.reference import Forward
from sqdf_fast.kernels.triton import jit, on, tl, unavailable

__all__ = ["forward", "unavailable"]

BLOCK = 256


@jit(do_not_specialize=["n_terms"])
def forward_kernel(
    reward,
    kl,
    remaining,
    loss,
    grad_reward,
    grad_kl,
    log2_gamma,
    alpha,
    scale,
    n_terms,
    MASK_NONPOSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    i_start = 0
    while i_start < n_terms:  # the interpreter of Triton 3.6 has no range over an argument
        o_t = i_start + tl.arange(0, BLOCK)
        m_t = o_t < n_terms
        b_reward = tl.load(reward + o_t, mask=m_t, other=0).to(tl.float32)
        b_kl = tl.load(kl + o_t, mask=m_t, other=0).to(tl.float32)
        b_weight = tl.exp2(tl.load(remaining + o_t, mask=m_t, other=0).to(tl.float32) * log2_gamma)
        m_counted = m_t
        if MASK_NONPOSITIVE:
            # written so that a NaN reward counts
            m_counted = m_t & ~(b_reward <= 0)
        b_sum += tl.where(m_counted, alpha * b_kl - b_weight * b_reward, 0.0)
        tl.store(grad_reward + o_t, tl.where(m_counted, -b_weight * scale, 0.0), mask=m_t)
        tl.store(grad_kl + o_t, tl.where(m_counted, alpha * scale, 0.0), mask=m_t)
        i_start += BLOCK
    tl.store(loss, tl.sum(b_sum) * scale)


def forward(given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, float32 [], and its gradients with respect to reward and kl, float32, shaped like reward."""
    reward, kl, remaining, gamma, alpha, mask_nonpositive, denominator = given
    reward, kl, remaining = reward.contiguous(), kl.contiguous(), remaining.contiguous()
    loss = torch.empty((), dtype=torch.float32, device=reward.device)
    grad_reward, grad_kl = (reward.new_empty(reward.shape, dtype=torch.float32) for _ in range(2))
    tensors = reward, kl, remaining, loss, grad_reward, grad_kl
    numbers = math.log2(gamma), alpha, 1.0 / denominator, reward.numel()
    with on(reward.device):
        forward_kernel[(1,)](*tensors, *numbers, mask_nonpositive, BLOCK, num_warps=4)
    return loss, grad_reward, grad_kl
