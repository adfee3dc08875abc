"""denoise_step on the CPU through the native library: the raw forward and backward behind op.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.denoise_step.reference import Backward, Forward
from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.native import address, run_rows, typed, unavailable

__all__ = ["backward", "forward", "unavailable"]


def forward(given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """See `Forward`; kl is float32."""
    x, policy, reference, transition, index, guidance_scale, noise, seed, kl_scale, with_delta = given
    x, policy, reference = x.contiguous(), policy.contiguous(), reference.contiguous()
    noise = None if noise is None else noise.contiguous()
    seed = None if seed is None else seed.contiguous()
    x_prev = torch.empty_like(x, memory_format=torch.contiguous_format)
    kl = x.new_empty(x.shape[0], dtype=torch.float32)
    delta = torch.empty_like(x_prev, dtype=policy.dtype) if with_delta else policy.new_empty(0)
    inputs = *typed(x), *typed(policy), *typed(reference), *typed(noise), address(seed)
    scales, outputs = (guidance_scale, kl_scale), (x_prev.data_ptr(), kl.data_ptr(), delta.data_ptr())
    name, letters = "sqdf_fast_denoise_step_forward", "pipipipipplpddllpppi"
    run_rows(name, letters, inputs, transition, index, scales, x, outputs)
    return x_prev, kl, delta


def backward(given: Backward) -> tuple[Tensor, Tensor]:
    """See `Backward`."""
    grad_x_prev, grad_kl, delta, transition, index, guidance_scale, kl_scale, x_dtype, policy_dtype = given
    grad_x_prev, delta = grad_x_prev.contiguous(), delta.contiguous()
    grad_kl = grad_kl.to(torch.float32).contiguous()
    grads = empty_gradients(grad_x_prev, guidance_scale, x_dtype, policy_dtype)
    inputs = *typed(grad_x_prev), grad_kl.data_ptr(), *typed(delta)
    scales, outputs = (guidance_scale, kl_scale), (*typed(grads[0]), *typed(grads[1]))
    name, letters = "sqdf_fast_denoise_step_backward", "pippiplpddllpipii"
    run_rows(name, letters, inputs, transition, index, scales, grad_x_prev, outputs)
    return grads
