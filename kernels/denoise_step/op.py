"""denoise_step as PyTorch operators: schema, fake tensors and autograd of the fused implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.operators import Operator


def _fake_forward(x: Tensor, policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_delta = rest[-1]
    kl = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), kl, policy.new_empty(x.shape if with_delta else (0,))


def _fake_backward(grad_x_prev: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    guidance_scale, _kl_scale, *needs = rest[4:]
    return empty_gradients(grad_x_prev, guidance_scale, *needs)


denoise_step = Operator(
    "denoise_step",
    "forward",
    "denoise_step",
    "(Tensor x, Tensor policy, Tensor reference, Tensor transition, Tensor index, float guidance_scale, Tensor? noise, "
    "Tensor? seed, float kl_scale, bool with_delta) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
denoise_step_backward = Operator(
    "denoise_step",
    "backward",
    "denoise_step_backward",
    "(Tensor grad_x_prev, Tensor grad_kl, Tensor delta, Tensor transition, Tensor index, float guidance_scale, "
    "float kl_scale, ScalarType x_dtype, ScalarType policy_dtype, bool need_x, bool need_policy) -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, policy, _, transition, index, guidance_scale, _, _, kl_scale, _ = inputs
    ctx.save_for_backward(output[2], transition, index)
    ctx.settings = guidance_scale, kl_scale, x.dtype, policy.dtype
    ctx.shape = x.shape


def _backward(ctx: Any, grad_x_prev: Tensor | None, grad_kl: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    delta, transition, index = ctx.saved_tensors
    need_x, need_policy = ctx.needs_input_grad[:2]
    if grad_x_prev is None:
        grad_x_prev = delta.new_zeros(ctx.shape, dtype=ctx.settings[2])
    if grad_kl is None:
        grad_kl = delta.new_zeros(ctx.shape[0], dtype=torch.float32)
    grad_x, grad_policy = denoise_step_backward(
        grad_x_prev, grad_kl, delta, transition, index, *ctx.settings, need_x, need_policy
    )
    return (grad_x if need_x else None, grad_policy if need_policy else None, *(None,) * 8)


denoise_step.register_backward(_setup_context, _backward)
