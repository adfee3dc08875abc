"""denoise_step on the CPU through the native library: the raw forward and backward of op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels import native
from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.native import dtype_number, unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """x_prev like x, kl float32 [B], delta like x in the dtype of policy ([0] unless with_delta)."""
    x, policy, reference = x.contiguous(), policy.contiguous(), reference.contiguous()
    transition, index = native.coefficients(transition), index.contiguous()
    noise = None if noise is None else noise.contiguous()
    seed = None if seed is None else seed.contiguous()
    batch, steps = x.shape[0], transition.shape[0]
    x_prev = torch.empty_like(x, memory_format=torch.contiguous_format)
    kl = x.new_empty(batch, dtype=torch.float32)
    delta = torch.empty_like(x_prev, dtype=policy.dtype) if with_delta else policy.new_empty(0)
    outside = native.function("sqdf_fast_denoise_step_forward", "pipipipipplpddllpppi", "i")(
        x.data_ptr(),
        dtype_number(x.dtype),
        policy.data_ptr(),
        dtype_number(policy.dtype),
        reference.data_ptr(),
        dtype_number(reference.dtype),
        None if noise is None else noise.data_ptr(),
        0 if noise is None else dtype_number(noise.dtype),
        None if seed is None else seed.data_ptr(),
        transition.data_ptr(),
        steps,
        index.data_ptr(),
        guidance_scale,
        kl_scale,
        batch,
        x.numel() // batch,
        x_prev.data_ptr(),
        kl.data_ptr(),
        delta.data_ptr() if with_delta else None,
        native.threads(),
    )
    native.check_index(outside, steps)
    return x_prev, kl, delta


def backward(
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
) -> tuple[Tensor, Tensor]:
    """grad_x like grad_x_prev, grad_policy [B or 2B, ...]; the one not needed is [0] and not computed."""
    grad_x_prev, delta = grad_x_prev.contiguous(), delta.contiguous()
    grad_kl = grad_kl.to(torch.float32).contiguous()
    transition, index = native.coefficients(transition), index.contiguous()
    batch, steps = grad_x_prev.shape[0], transition.shape[0]
    needs = x_dtype, policy_dtype, need_x, need_policy
    grad_x, grad_policy = empty_gradients(grad_x_prev, guidance_scale, *needs)
    outside = native.function("sqdf_fast_denoise_step_backward", "pippiplpddllpipii", "i")(
        grad_x_prev.data_ptr(),
        dtype_number(grad_x_prev.dtype),
        grad_kl.data_ptr(),
        delta.data_ptr(),
        dtype_number(delta.dtype),
        transition.data_ptr(),
        steps,
        index.data_ptr(),
        guidance_scale,
        kl_scale,
        batch,
        grad_x_prev.numel() // batch,
        grad_x.data_ptr() if need_x else None,
        dtype_number(x_dtype),
        grad_policy.data_ptr() if need_policy else None,
        dtype_number(policy_dtype),
        native.threads(),
    )
    native.check_index(outside, steps)
    return grad_x, grad_policy
