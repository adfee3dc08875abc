"""posterior_mean on the CPU through the native library: the raw forward and backward behind op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.native import run_rows, typed, unavailable

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
    x0 = x.new_empty(x.shape, dtype=out_dtype)
    inputs, outputs = (*typed(x), *typed(model_output)), typed(x0)
    name, letters = "sqdf_fast_posterior_mean_forward", "pipiplpdllpii"
    run_rows(name, letters, inputs, posterior, index, (guidance_scale,), x, outputs)
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
    grad_x0 = grad_x0.contiguous()
    grads = empty_gradients(grad_x0, guidance_scale, x_dtype, output_dtype, need_x, need_output)
    outputs = *typed(grads[0]), *typed(grads[1])
    name, letters = "sqdf_fast_posterior_mean_backward", "piplpdllpipii"
    run_rows(name, letters, typed(grad_x0), posterior, index, (guidance_scale,), grad_x0, outputs)
    return grads
