"""posterior_mean as PyTorch operators: schema, fake tensors and autograd of the fused implementations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.operators import Operator


def _fake_forward(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-1])


def _fake_backward(grad_x0: Tensor, _posterior: Tensor, _index: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_gradients(grad_x0, *settings)


posterior_mean = Operator(
    "posterior_mean",
    "forward",
    "posterior_mean",
    "(Tensor x, Tensor model_output, Tensor posterior, Tensor index, float guidance_scale, ScalarType out_dtype) "
    "-> Tensor",
    _fake_forward,
)
posterior_mean_backward = Operator(
    "posterior_mean",
    "backward",
    "posterior_mean_backward",
    "(Tensor grad_x0, Tensor posterior, Tensor index, float guidance_scale, ScalarType x_dtype, "
    "ScalarType output_dtype, bool need_x, bool need_output) -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, model_output, posterior, index, guidance_scale, _ = inputs
    ctx.save_for_backward(posterior, index)
    ctx.settings = guidance_scale, x.dtype, model_output.dtype


def _backward(ctx: Any, grad_x0: Tensor | None) -> tuple[Any, ...]:
    if grad_x0 is None:
        return (None,) * 6
    need_x, need_output = ctx.needs_input_grad[:2]
    grad_x, grad_output = posterior_mean_backward(grad_x0, *ctx.saved_tensors, *ctx.settings, need_x, need_output)
    return (grad_x if need_x else None, grad_output if need_output else None, *(None,) * 4)


posterior_mean.register_backward(_setup_context, _backward)
