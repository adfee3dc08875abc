"""denoise_step in plain PyTorch: the meaning of the op."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import guide, guide_vjp, per_sample
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.kernels.validation import math_dtype


def denoise_step_staged(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    transition: Tensor,
    index: Tensor,
    guidance_scale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    kl_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, ...], policy and reference [B or 2B, ...] -> x_prev [B, ...], kl [B], delta [B, ...].

    Differentiable by autograd; the caller detaches the reference.
    """
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


def denoise_step_vjp(
    grad_x_prev: Tensor,
    grad_kl: Tensor,
    delta: Tensor,
    transition: Tensor,
    index: Tensor,
    guidance_scale: float,
    kl_scale: float,
) -> Tensor:
    """grad_x_prev [B, ...], grad_kl [B], delta [B, ...] -> the cotangent of policy [B or 2B, ...]."""
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
