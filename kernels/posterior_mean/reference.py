"""posterior_mean in plain PyTorch: the meaning of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import guide, guide_vjp, per_sample
from sqdf_fast.kernels.validation import math_dtype


def posterior_mean(
    x: Tensor, model_output: Tensor, posterior: Tensor, index: Tensor, guidance_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """x [B, ...], model_output [B or 2B, ...], posterior [T, 2], index [B] -> x0_hat [B, ...].

    Differentiable by autograd with respect to x and model_output.
    """
    dtype = math_dtype(x, model_output)
    a, b = (per_sample(column, x) for column in posterior[index].to(dtype).unbind(1))
    m = guide(model_output.to(dtype), guidance_scale)
    m = torch.where(b == 0, torch.zeros_like(m), m)
    return (a * x.to(dtype) + b * m).to(out_dtype)


def posterior_mean_vjp(
    grad_x0: Tensor, posterior: Tensor, index: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """grad_x0 [B, ...] -> the cotangents of x [B, ...] and model_output [B or 2B, ...]."""
    dtype = math_dtype(grad_x0)
    a, b = (per_sample(column, grad_x0) for column in posterior[index].to(dtype).unbind(1))
    grad = grad_x0.to(dtype)
    return a * grad, guide_vjp(b * grad, guidance_scale)
