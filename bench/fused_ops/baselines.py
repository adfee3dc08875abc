"""The ops as one writes them in PyTorch from their formulas: what eager PyTorch and torch.compile run.

No checks and no dispatch: a baseline pays for arithmetic alone. Half-precision inputs are computed in float32,
like ours, and noise that is drawn comes from torch.randn: the counter-based generator in PyTorch integers would
be an unfairly slow opponent.
"""

from __future__ import annotations

import torch
from torch import Tensor


def denoise_step(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    transition: Tensor,
    index: Tensor,
    guidance_scale: float,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """x, noise [B, ...], policy, reference [2B, ...] -> x_prev [B, ...], kl [B]."""
    p, q, sigma = _columns(transition, index, x)
    m, m_ref = _guide(policy, guidance_scale), _guide(reference, guidance_scale)
    x_prev = p * x.float() + q * m + sigma * noise.float()
    kl = ((q / sigma) * (m - m_ref)).square().flatten(1).mean(1)
    return x_prev.to(x.dtype), kl


def denoise_step_drawing(
    x: Tensor, policy: Tensor, reference: Tensor, transition: Tensor, index: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """`denoise_step` that draws its noise."""
    return denoise_step(x, policy, reference, transition, index, guidance_scale, torch.randn_like(x))


def posterior_mean(x: Tensor, model_output: Tensor, posterior: Tensor, index: Tensor, guidance_scale: float) -> Tensor:
    """x [B, ...], model_output [2B, ...] -> x0 [B, ...]."""
    a, b = _columns(posterior, index, x)
    return (a * x.float() + b * _guide(model_output, guidance_scale)).to(x.dtype)


def discounted_loss(reward: Tensor, kl: Tensor, remaining: Tensor, gamma: float, alpha: float) -> Tensor:
    """reward, kl, remaining [B] or [K, B] -> scalar."""
    return (alpha * kl - gamma**remaining * reward).mean()


def _columns(table: Tensor, index: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    rows = table[index].reshape(len(index), -1, *(1,) * (x.ndim - 1))
    return rows.unbind(1)


def _guide(output: Tensor, guidance_scale: float) -> Tensor:
    unconditional, conditional = output.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
