"""posterior_mean as PyTorch operators: schema, fake tensors and autograd of the fused implementations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients, wanted
from sqdf_fast.kernels.operators import Operator
from sqdf_fast.kernels.posterior_mean.reference import Backward, Forward


def _fake_forward(given: Forward) -> Tensor:
    return given.x.new_empty(given.x.shape, dtype=given.out_dtype)


def _fake_backward(given: Backward) -> tuple[Tensor, Tensor]:
    return empty_gradients(given.grad_x0, given.guidance_scale, given.x_dtype, given.output_dtype)


posterior_mean = Operator("posterior_mean", "forward", Forward, 1, _fake_forward)
posterior_mean_backward = Operator("posterior_mean", "backward", Backward, 2, _fake_backward)


def _setup_context(ctx: Any, given: Forward, output: Tensor) -> None:
    ctx.save_for_backward(given.posterior, given.rows)
    ctx.guidance_scale, ctx.dtypes = given.guidance_scale, (given.x.dtype, given.model_output.dtype)


def _backward(ctx: Any, grad_x0: Tensor | None) -> tuple[Any, ...]:
    if grad_x0 is None:
        return (None,) * 6
    dtypes = wanted(ctx)
    grads = posterior_mean_backward(grad_x0, *ctx.saved_tensors, ctx.guidance_scale, *dtypes)
    return grads[0] if dtypes[0] else None, grads[1] if dtypes[1] else None, *(None,) * 4


posterior_mean.register_backward(_setup_context, _backward)
