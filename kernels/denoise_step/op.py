"""denoise_step as PyTorch operators: what fake tensors see, what autograd does, around a fused implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqdf_fast.kernels.autograd import differentiable, plain
from sqdf_fast.kernels.dispatch import module
from sqdf_fast.kernels.guidance import empty_gradients


def _forward(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    transition: Tensor,
    index: Tensor,
    guidance_scale: float,
    noise: Tensor | None,
    seed: Tensor | None,
    kl_scale: float,
    with_delta: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x_prev, kl, delta = module("denoise_step", impl).forward(
        x, policy, reference, transition, index, guidance_scale, noise, seed, kl_scale, with_delta
    )
    return x_prev, kl, delta


def _backward(
    grad_x_prev: Tensor,
    grad_kl: Tensor,
    delta: Tensor,
    transition: Tensor,
    index: Tensor,
    guidance_scale: float,
    kl_scale: float,
    x_dtype: torch.dtype,
    policy_dtype: torch.dtype,
    need_x: bool,
    need_policy: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_policy = module("denoise_step", impl).backward(
        grad_x_prev,
        grad_kl,
        delta,
        transition,
        index,
        guidance_scale,
        kl_scale,
        x_dtype,
        policy_dtype,
        need_x,
        need_policy,
    )
    return grad_x, grad_policy


_forward_op = torch.library.custom_op("sqdf_fast::denoise_step", _forward, mutates_args=())
_backward_op = torch.library.custom_op("sqdf_fast::denoise_step_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, with_delta, _impl = rest
    kl = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), kl, policy.new_empty(x.shape if with_delta else (0,))


@_backward_op.register_fake
def _(grad_x_prev: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, guidance_scale, _kl_scale, x_dtype, policy_dtype, need_x, need_policy, _impl = rest
    return empty_gradients(grad_x_prev, guidance_scale, x_dtype, policy_dtype, need_x, need_policy)


def denoise_step_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Cotangents of x_prev and kl -> those of x [B, ...] and policy [B or 2B, ...]; [0] where not needed."""
    return _backward(*arguments) if plain(*arguments) else _backward_op(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, policy, _, transition, index, guidance_scale, _, _, kl_scale, _, impl = inputs
    ctx.save_for_backward(output[2], transition, index)
    ctx.settings = guidance_scale, kl_scale, x.dtype, policy.dtype, impl
    ctx.shape = x.shape


def _autograd(ctx: Any, grad_x_prev: Tensor | None, grad_kl: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    delta, transition, index = ctx.saved_tensors
    guidance_scale, kl_scale, x_dtype, policy_dtype, impl = ctx.settings
    need_x, need_policy = ctx.needs_input_grad[:2]
    if grad_x_prev is None:
        grad_x_prev = delta.new_zeros(ctx.shape, dtype=x_dtype)
    if grad_kl is None:
        grad_kl = delta.new_zeros(ctx.shape[0], dtype=torch.float32)
    grad_x, grad_policy = denoise_step_backward(
        grad_x_prev,
        grad_kl,
        delta,
        transition,
        index,
        guidance_scale,
        kl_scale,
        x_dtype,
        policy_dtype,
        need_x,
        need_policy,
        impl,
    )
    return (grad_x if need_x else None, grad_policy if need_policy else None, *(None,) * 9)


denoise_step = differentiable(_forward_op, _forward, _setup_context, _autograd)
