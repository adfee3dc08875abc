"""posterior_mean in plain PyTorch: the meaning of the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import guide, guide_vjp, per_sample
from sqdf_fast.kernels.validation import math_dtype


class Forward(NamedTuple):
    """Arguments of the forward. Result: x0_hat like x, in out_dtype."""

    x: Tensor  # [B, ...]
    model_output: Tensor  # [2B, ...] under guidance, else [B, ...]; not read where b = 0
    posterior: Tensor  # [T, 2]
    rows: Tensor  # int64 [B], every sample's row of the table
    guidance_scale: float
    out_dtype: torch.dtype


class Backward(NamedTuple):
    """Arguments of the backward. Results: the gradients of x and model_output; one without a dtype is [0]."""

    grad_x0: Tensor  # [B, ...]
    posterior: Tensor
    rows: Tensor
    guidance_scale: float
    x_dtype: torch.dtype | None
    output_dtype: torch.dtype | None


def forward(given: Forward) -> Tensor:
    """Differentiable by autograd with respect to x and model_output."""
    x, model_output, posterior, index, guidance_scale, out_dtype = given
    dtype = math_dtype(x, model_output)
    a, b = (per_sample(column, x) for column in posterior[index].to(dtype).unbind(1))
    m = guide(model_output.to(dtype), guidance_scale)
    m = torch.where(b == 0, torch.zeros_like(m), m)
    return (a * x.to(dtype) + b * m).to(out_dtype)


def backward(given: Backward) -> tuple[Tensor, Tensor]:
    """Both gradients, in the precision of the arithmetic."""
    grad_x0, posterior, index, guidance_scale, *_ = given
    dtype = math_dtype(grad_x0)
    a, b = (per_sample(column, grad_x0) for column in posterior[index].to(dtype).unbind(1))
    grad = grad_x0.to(dtype)
    return a * grad, guide_vjp(b * grad, guidance_scale)
