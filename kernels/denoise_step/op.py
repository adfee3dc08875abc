"""denoise_step as PyTorch operators: schema, fake tensors and autograd of the fused implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqdf_fast.kernels.denoise_step.reference import Backward, Forward
from sqdf_fast.kernels.guidance import empty_gradients, wanted
from sqdf_fast.kernels.operators import Operator


def _fake_forward(given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    x, policy = given.x, given.policy
    kl = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), kl, policy.new_empty(x.shape if given.with_delta else (0,))


def _fake_backward(given: Backward) -> tuple[Tensor, Tensor]:
    return empty_gradients(given.grad_x_prev, given.guidance_scale, given.x_dtype, given.policy_dtype)


denoise_step = Operator("denoise_step", "forward", Forward, 3, _fake_forward)
denoise_step_backward = Operator("denoise_step", "backward", Backward, 2, _fake_backward)


def _setup_context(ctx: Any, given: Forward, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], given.transition, given.rows)
    ctx.scales, ctx.shape = (given.guidance_scale, given.kl_scale), given.x.shape
    ctx.dtypes = given.x.dtype, given.policy.dtype


def _backward(ctx: Any, grad_x_prev: Tensor | None, grad_kl: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    delta, transition, index = ctx.saved_tensors
    if grad_x_prev is None:
        grad_x_prev = delta.new_zeros(ctx.shape, dtype=ctx.dtypes[0])
    if grad_kl is None:
        grad_kl = delta.new_zeros(ctx.shape[0], dtype=torch.float32)
    dtypes = wanted(ctx)
    grads = denoise_step_backward(grad_x_prev, grad_kl, delta, transition, index, *ctx.scales, *dtypes)
    return grads[0] if dtypes[0] else None, grads[1] if dtypes[1] else None, *(None,) * 8


denoise_step.register_backward(_setup_context, _backward)
