"""denoise_step in plain PyTorch: the meaning of the op."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import guide, guide_vjp, per_sample
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.kernels.validation import math_dtype


class Forward(NamedTuple):
    """Arguments of the forward. Results: x_prev like x, kl [B], delta like x in the dtype of policy."""

    x: Tensor  # [B, ...]
    policy: Tensor  # [2B, ...] under guidance, else [B, ...]
    reference: Tensor  # like policy
    transition: Tensor  # [T, 3]
    rows: Tensor  # int64 [B], every sample's row of the table
    guidance_scale: float
    noise: Tensor | None  # like x; exactly one of noise and seed is None
    seed: Tensor | None  # int64 [B]
    kl_scale: float
    with_delta: bool  # whether a fused implementation writes delta; otherwise it is [0]


class Backward(NamedTuple):
    """Arguments of the backward. Results: the gradients of x and policy; one without a dtype is [0], not computed."""

    grad_x_prev: Tensor  # [B, ...]
    grad_kl: Tensor  # [B]
    delta: Tensor  # [B, ...]
    transition: Tensor
    rows: Tensor
    guidance_scale: float
    kl_scale: float
    x_dtype: torch.dtype | None
    policy_dtype: torch.dtype | None


def forward(given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable by autograd; the caller detaches the reference."""
    x, policy, reference, transition, index, guidance_scale, noise, seed, kl_scale, _ = given
    dtype = math_dtype(x, policy, reference, noise)
    p, q, sigma = (per_sample(column, x) for column in transition[index].to(dtype).unbind(1))
    m = guide(policy.to(dtype), guidance_scale)
    # differences before guidance: those of nearby floats are exact, and a real delta is a thousandth of m
    delta = guide(policy.to(dtype) - reference.to(dtype), guidance_scale)
    z = noise if noise is not None else philox_normal(cast(Tensor, seed), x.shape[1:], dtype=dtype)
    x_prev = p * x.to(dtype) + q * m + sigma * z.to(dtype)
    mean_square = delta.square().flatten(1).mean(1)
    weight = kl_weight(transition, index, kl_scale, dtype)
    # 0 * inf: equal outputs cost nothing even where sigma is 0
    kl = torch.where(mean_square == 0, torch.zeros_like(weight), weight) * mean_square
    return x_prev.to(x.dtype), kl, delta.detach().to(policy.dtype)


def policy_gradient(given: Backward) -> Tensor:
    """The gradient of policy, in the precision of the arithmetic."""
    grad_x_prev, grad_kl, delta, transition, index, guidance_scale, kl_scale, *_ = given
    dtype = math_dtype(grad_x_prev, grad_kl, delta)
    elements = delta[0].numel()
    weight = kl_weight(transition, index, kl_scale, dtype)
    grad_kl, difference = grad_kl.to(dtype), delta.to(dtype)
    # 0 * inf twice: neither a KL that is not in the loss nor equal outputs give a gradient
    pull = torch.where(grad_kl == 0, torch.zeros_like(weight), grad_kl * weight * (2.0 / elements))
    pull = torch.where(difference == 0, torch.zeros_like(difference), per_sample(pull, delta) * difference)
    grad = per_sample(transition[index, 1].to(dtype), delta) * grad_x_prev.to(dtype) + pull
    return guide_vjp(grad, guidance_scale)


def kl_weight(transition: Tensor, index: Tensor, kl_scale: float, dtype: torch.dtype) -> Tensor:
    """kl_scale q^2 / sigma^2 per sample, [B]; 0 where q = 0, infinite where only sigma = 0."""
    _, q, sigma = transition[index].to(dtype).unbind(1)
    return torch.where(q == 0, torch.zeros_like(q), kl_scale * (q / sigma).square())
