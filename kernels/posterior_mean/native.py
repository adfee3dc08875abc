"""posterior_mean on the CPU through the native library: the raw forward and backward of op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels import native
from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.native import dtype_number, unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(
    x: Tensor,
    model_output: Tensor,
    posterior: Tensor,
    index: Tensor,
    guidance_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """x0 like x in out_dtype; a row with b = 0 does not read model_output."""
    x, model_output = x.contiguous(), model_output.contiguous()
    posterior, index = native.coefficients(posterior), index.contiguous()
    batch, steps = x.shape[0], posterior.shape[0]
    x0 = x.new_empty(x.shape, dtype=out_dtype)
    outside = native.function("sqdf_fast_posterior_mean_forward", "pipiplpdllpii", "i")(
        x.data_ptr(),
        dtype_number(x.dtype),
        model_output.data_ptr(),
        dtype_number(model_output.dtype),
        posterior.data_ptr(),
        steps,
        index.data_ptr(),
        guidance_scale,
        batch,
        x.numel() // batch,
        x0.data_ptr(),
        dtype_number(out_dtype),
        native.threads(),
    )
    native.check_index(outside, steps)
    return x0


def backward(
    grad_x0: Tensor,
    posterior: Tensor,
    index: Tensor,
    guidance_scale: float,
    x_dtype: torch.dtype,
    output_dtype: torch.dtype,
    need_x: bool,
    need_output: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x like grad_x0, grad_output [B or 2B, ...]; the one not needed is [0] and not computed."""
    grad_x0, posterior, index = grad_x0.contiguous(), native.coefficients(posterior), index.contiguous()
    batch, steps = grad_x0.shape[0], posterior.shape[0]
    needs = x_dtype, output_dtype, need_x, need_output
    grad_x, grad_output = empty_gradients(grad_x0, guidance_scale, *needs)
    outside = native.function("sqdf_fast_posterior_mean_backward", "piplpdllpipii", "i")(
        grad_x0.data_ptr(),
        dtype_number(grad_x0.dtype),
        posterior.data_ptr(),
        steps,
        index.data_ptr(),
        guidance_scale,
        batch,
        grad_x0.numel() // batch,
        grad_x.data_ptr() if need_x else None,
        dtype_number(x_dtype),
        grad_output.data_ptr() if need_output else None,
        dtype_number(output_dtype),
        native.threads(),
    )
    native.check_index(outside, steps)
    return grad_x, grad_output
