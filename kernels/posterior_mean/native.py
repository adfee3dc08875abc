"""posterior_mean on the CPU through the native library: the raw forward and backward behind op.py."""

from __future__ import annotations

from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.native import run_rows, typed, unavailable
from sqdf_fast.kernels.posterior_mean.reference import Backward, Forward

__all__ = ["backward", "forward", "unavailable"]


def forward(given: Forward) -> Tensor:
    """See `Forward`."""
    x, model_output, posterior, index, guidance_scale, out_dtype = given
    x, model_output = x.contiguous(), model_output.contiguous()
    x0 = x.new_empty(x.shape, dtype=out_dtype)
    inputs, outputs = (*typed(x), *typed(model_output)), typed(x0)
    name, letters = "sqdf_fast_posterior_mean_forward", "pipiplpdllpii"
    run_rows(name, letters, inputs, posterior, index, (guidance_scale,), x, outputs)
    return x0


def backward(given: Backward) -> tuple[Tensor, Tensor]:
    """See `Backward`."""
    grad_x0, posterior, index, guidance_scale, x_dtype, output_dtype = given
    grad_x0 = grad_x0.contiguous()
    grads = empty_gradients(grad_x0, guidance_scale, x_dtype, output_dtype)
    outputs = *typed(grads[0]), *typed(grads[1])
    name, letters = "sqdf_fast_posterior_mean_backward", "piplpdllpipii"
    run_rows(name, letters, typed(grad_x0), posterior, index, (guidance_scale,), grad_x0, outputs)
    return grads
