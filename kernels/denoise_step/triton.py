"""denoise_step on CUDA: one pass over the latents each way, and a few numbers per row for the KL's second stage."""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.denoise_step.reference import Backward, Forward
from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.philox.triton import normal_block
from sqdf_fast.kernels.triton import (
    BLOCK,
    aligned,
    coefficient,
    jit,
    layout,
    on,
    piece_of_row,
    table_row,
    tl,
    unavailable,
)

__all__ = ["backward", "forward", "unavailable"]


@jit
def kl_weight(q, sigma, kl_scale):
    """kl_scale q^2 / sigma^2; 0 where q = 0, infinite where only sigma = 0."""
    ratio = tl.div_rn(q, sigma)
    return tl.where(q == 0, 0.0, kl_scale * ratio * ratio)


@jit(do_not_specialize=["n_rows", "n_pieces", "n_steps", "stride", "column_stride"])
def forward_kernel(
    x,
    policy,
    reference,
    noise,
    seed,
    transition,
    index,
    x_prev,
    delta,
    partial,
    guidance_scale,
    n_rows,
    n_elements,
    n_pieces,
    n_steps,
    stride,
    column_stride,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_piece, i_x, o_n, m_n = piece_of_row(n_elements, n_pieces, BLOCK)
    b_x = tl.load(x + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    b_m = tl.load(policy + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    b_delta = b_m - tl.load(reference + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    if GUIDED:
        i_cond = i_x + n_rows.to(tl.int64) * n_elements
        b_cond = tl.load(policy + i_cond + o_n, mask=m_n, other=0).to(tl.float32)
        b_delta_cond = b_cond - tl.load(reference + i_cond + o_n, mask=m_n, other=0).to(tl.float32)
        b_m += guidance_scale * (b_cond - b_m)
        # differences before guidance: those of nearby floats are exact
        b_delta += guidance_scale * (b_delta_cond - b_delta)
    if noise is None:
        b_z = normal_block(tl.load(seed + i_row), i_piece, BLOCK)
    else:
        b_z = tl.load(noise + i_x + o_n, mask=m_n, other=0).to(tl.float32)

    p_row, m_row = table_row(transition, index, i_row, n_steps, stride)
    p, q, sigma = (
        coefficient(p_row, m_row, 0),
        coefficient(p_row, m_row, column_stride),
        coefficient(p_row, m_row, 2 * column_stride),
    )
    b_x_prev = p * b_x + q * b_m + sigma * b_z
    tl.store(x_prev + i_x + o_n, b_x_prev.to(x_prev.dtype.element_ty), mask=m_n)
    if delta is not None:
        tl.store(delta + i_x + o_n, b_delta.to(delta.dtype.element_ty), mask=m_n)
    tl.store(partial + i_row * n_pieces + i_piece, tl.sum(b_delta * b_delta))


@jit(do_not_specialize=["n_elements", "n_pieces", "n_steps", "stride", "column_stride"])
def kl_kernel(
    partial, transition, index, kl, kl_scale, n_elements, n_pieces, n_steps, stride, column_stride, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    i_start = 0
    while i_start < n_pieces:  # the interpreter of Triton 3.6 has no range over an argument
        o_p = i_start + tl.arange(0, BLOCK)
        b_sum += tl.load(partial + i_row * n_pieces + o_p, mask=o_p < n_pieces, other=0)
        i_start += BLOCK
    mean_square = tl.div_rn(tl.sum(b_sum), n_elements.to(tl.float32))
    p_row, m_row = table_row(transition, index, i_row, n_steps, stride)
    q, sigma = coefficient(p_row, m_row, column_stride), coefficient(p_row, m_row, 2 * column_stride)
    # 0 * inf: equal outputs cost nothing even where sigma is 0
    weight = tl.where(mean_square == 0, 0.0, kl_weight(q, sigma, kl_scale))
    tl.store(kl + i_row, weight * mean_square)


@jit(do_not_specialize=["n_rows", "n_pieces", "n_steps", "stride", "column_stride", "kl_stride"])
def backward_kernel(
    grad_x_prev,
    grad_kl,
    delta,
    transition,
    index,
    grad_x,
    grad_policy,
    cond_scale,
    uncond_scale,
    kl_scale,
    mean_scale,
    n_rows,
    n_elements,
    n_pieces,
    n_steps,
    stride,
    column_stride,
    kl_stride,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, _, i_x, o_n, m_n = piece_of_row(n_elements, n_pieces, BLOCK)
    b_grad = tl.load(grad_x_prev + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    p_row, m_row = table_row(transition, index, i_row, n_steps, stride)
    if grad_x is not None:
        tl.store(grad_x + i_x + o_n, (coefficient(p_row, m_row, 0) * b_grad).to(grad_x.dtype.element_ty), mask=m_n)
    if grad_policy is not None:
        b_delta = tl.load(delta + i_x + o_n, mask=m_n, other=0).to(tl.float32)
        q, sigma = coefficient(p_row, m_row, column_stride), coefficient(p_row, m_row, 2 * column_stride)
        g_kl = tl.load(grad_kl + i_row * kl_stride).to(tl.float32)
        # 0 * inf: a KL that is not in the loss gives no gradient
        pull = tl.where(g_kl == 0, 0.0, g_kl * kl_weight(q, sigma, kl_scale) * mean_scale)
        # 0 * inf again, element by element
        b_grad = q * b_grad + tl.where(b_delta == 0, 0.0, pull * b_delta)
        if GUIDED:
            tl.store(grad_policy + i_x + o_n, (uncond_scale * b_grad).to(grad_policy.dtype.element_ty), mask=m_n)
            i_cond = i_x + n_rows.to(tl.int64) * n_elements
            tl.store(grad_policy + i_cond + o_n, (cond_scale * b_grad).to(grad_policy.dtype.element_ty), mask=m_n)
        else:
            tl.store(grad_policy + i_x + o_n, b_grad.to(grad_policy.dtype.element_ty), mask=m_n)


def forward(given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """See `Forward`; kl is float32."""
    x, policy, reference, transition, index, guidance_scale, noise, seed, kl_scale, with_delta = given
    x, transition, index = aligned(x), transition.float(), index.contiguous()
    sizes, grid, n_warps = layout(x, transition)
    _, elements, n_pieces, *table_sizes = sizes
    x_prev = x.new_empty(x.shape)
    delta = torch.empty(x.shape if with_delta else 0, dtype=policy.dtype, device=x.device)
    partial = torch.empty(len(x), n_pieces, dtype=torch.float32, device=x.device)
    kl = torch.empty(len(x), dtype=torch.float32, device=x.device)
    z = None if noise is None else aligned(noise), None if seed is None else seed.contiguous()
    inputs = x, aligned(policy), aligned(reference), *z, transition, index
    outputs = x_prev, delta if with_delta else None, partial
    with on(x.device):
        forward_kernel[grid](*inputs, *outputs, guidance_scale, *sizes, guidance_scale != 1, BLOCK, num_warps=n_warps)
        rest = kl_scale, elements, n_pieces, *table_sizes, BLOCK
        kl_kernel[(len(x),)](partial, transition, index, kl, *rest, num_warps=n_warps)
    return x_prev, kl, delta


def backward(given: Backward) -> tuple[Tensor, Tensor]:
    """See `Backward`."""
    grad_x_prev, grad_kl, delta, transition, index, guidance_scale, kl_scale, x_dtype, policy_dtype = given
    grad_x_prev, transition = aligned(grad_x_prev), transition.float()
    sizes, grid, n_warps = layout(grad_x_prev, transition)
    grads = empty_gradients(grad_x_prev, guidance_scale, x_dtype, policy_dtype)
    inputs = grad_x_prev, grad_kl, aligned(delta) if policy_dtype else None, transition, index.contiguous()
    outputs = grads[0] if x_dtype else None, grads[1] if policy_dtype else None
    scales = guidance_scale, 1.0 - guidance_scale, kl_scale, 2.0 / sizes[1]
    settings = guidance_scale != 1, BLOCK
    if x_dtype or policy_dtype:
        with on(grad_x_prev.device):
            backward_kernel[grid](*inputs, *outputs, *scales, *sizes, grad_kl.stride(0), *settings, num_warps=n_warps)
    return grads
