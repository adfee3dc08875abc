"""Classifier-free guidance, its two halves of a gradient, and broadcasting of per-sample coefficients."""

from __future__ import annotations

from typing import Any

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
    grad: Tensor, guidance_scale: float, x_dtype: torch.dtype | None, output_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Uninitialized gradients of x [B, ...] and of the network output, [2B, ...] or for g = 1 [B, ...].

    One whose dtype is None is not wanted: [0].
    """
    batch, *sample = shape = grad.shape
    rows = batch if guidance_scale == 1 else 2 * batch
    return (
        grad.new_empty(shape if x_dtype else (0,), dtype=x_dtype),
        grad.new_empty((rows, *sample) if output_dtype else (0,), dtype=output_dtype),
    )


def wanted(ctx: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Dtypes of the gradients for an op's first two inputs, whose own are `ctx.dtypes`; None: not needed."""
    (first, second), needed = ctx.dtypes, ctx.needs_input_grad
    return first if needed[0] else None, second if needed[1] else None
