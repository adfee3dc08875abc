"""Classifier-free guidance, its two halves of a gradient, and broadcasting of per-sample coefficients."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(output: Tensor, guidance_scale: float) -> Tensor:
    """[2B, ...] ordered [uncond; cond] -> m_uncond + g (m_cond - m_uncond), [B, ...]; unchanged for g = 1."""
    if guidance_scale == 1:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def guide_vjp(grad: Tensor, guidance_scale: float) -> Tensor:
    """The backward of `guide`: [B, ...] -> [2B, ...]; unchanged for g = 1."""
    if guidance_scale == 1:
        return grad
    return torch.cat([(1.0 - guidance_scale) * grad, guidance_scale * grad])


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply with x [B, ...]."""
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))


def empty_gradients(
    grad: Tensor,
    guidance_scale: float,
    x_dtype: torch.dtype,
    output_dtype: torch.dtype,
    need_x: bool,
    need_output: bool,
) -> tuple[Tensor, Tensor]:
    """Uninitialised results of a backward: for x [B, ...], for the network output [2B, ...] ([B, ...] if g = 1).

    The one that is not needed is [0].
    """
    rows = grad.shape[0] * (1 if guidance_scale == 1 else 2)
    nothing = (0,)
    grad_x = grad.new_empty(grad.shape if need_x else nothing, dtype=x_dtype)
    return grad_x, grad.new_empty((rows, *grad.shape[1:]) if need_output else nothing, dtype=output_dtype)
