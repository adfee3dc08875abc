"""posterior_mean on CUDA: one pass over the latents each way."""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.triton import (
    BLOCK,
    aligned,
    coefficient,
    jit,
    on,
    piece_of_row,
    pieces,
    table_row,
    tl,
    unavailable,
    warps,
)

__all__ = ["backward", "forward", "unavailable"]


@jit(do_not_specialize=["n_rows", "n_pieces", "n_steps", "stride", "column_stride"])
def forward_kernel(
    x,
    output,
    posterior,
    index,
    x0,
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
    i_row, _, i_x, o_n, m_n = piece_of_row(n_elements, n_pieces, BLOCK)
    b_x = tl.load(x + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    p_row, m_row = table_row(posterior, index, i_row, n_steps, stride)
    a, b = coefficient(p_row, m_row, 0), coefficient(p_row, m_row, column_stride)
    # a row with b = 0 does not load the network output at all
    m_output = tl.where(b == 0, False, m_n)
    b_m = tl.load(output + i_x + o_n, mask=m_output, other=0).to(tl.float32)
    if GUIDED:
        i_cond = i_x + n_rows.to(tl.int64) * n_elements
        b_m += guidance_scale * (tl.load(output + i_cond + o_n, mask=m_output, other=0).to(tl.float32) - b_m)
    tl.store(x0 + i_x + o_n, (a * b_x + b * b_m).to(x0.dtype.element_ty), mask=m_n)


@jit(do_not_specialize=["n_rows", "n_pieces", "n_steps", "stride", "column_stride"])
def backward_kernel(
    grad_x0,
    posterior,
    index,
    grad_x,
    grad_output,
    cond_scale,
    uncond_scale,
    n_rows,
    n_elements,
    n_pieces,
    n_steps,
    stride,
    column_stride,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, _, i_x, o_n, m_n = piece_of_row(n_elements, n_pieces, BLOCK)
    b_grad = tl.load(grad_x0 + i_x + o_n, mask=m_n, other=0).to(tl.float32)
    p_row, m_row = table_row(posterior, index, i_row, n_steps, stride)
    if grad_x is not None:
        tl.store(grad_x + i_x + o_n, (coefficient(p_row, m_row, 0) * b_grad).to(grad_x.dtype.element_ty), mask=m_n)
    if grad_output is not None:
        b = coefficient(p_row, m_row, column_stride)
        b_grad = tl.where(b == 0, 0.0, b * b_grad)
        if GUIDED:
            tl.store(grad_output + i_x + o_n, (uncond_scale * b_grad).to(grad_output.dtype.element_ty), mask=m_n)
            i_cond = i_x + n_rows.to(tl.int64) * n_elements
            tl.store(grad_output + i_cond + o_n, (cond_scale * b_grad).to(grad_output.dtype.element_ty), mask=m_n)
        else:
            tl.store(grad_output + i_x + o_n, b_grad.to(grad_output.dtype.element_ty), mask=m_n)


def forward(
    x: Tensor,
    model_output: Tensor,
    posterior: Tensor,
    index: Tensor,
    guidance_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """x0_hat shaped like x, in out_dtype."""
    x = aligned(x)
    posterior = posterior.float()
    rows, elements = x.shape[0], x.numel() // x.shape[0]
    n_pieces = pieces(elements)
    x0 = x.new_empty(x.shape, dtype=out_dtype)
    with on(x.device):
        forward_kernel[(rows * n_pieces,)](
            x,
            aligned(model_output),
            posterior,
            index.contiguous(),
            x0,
            guidance_scale,
            rows,
            elements,
            n_pieces,
            len(posterior),
            *posterior.stride(),
            guidance_scale != 1,
            BLOCK,
            num_warps=warps(elements),
        )
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
    """grad_x [B, ...] in x_dtype, grad_output [B or 2B, ...] in output_dtype; [0] where not needed."""
    grad_x0 = aligned(grad_x0)
    posterior = posterior.float()
    rows = len(grad_x0)
    elements = grad_x0.numel() // rows
    n_pieces = pieces(elements)
    guided = guidance_scale != 1
    needs = x_dtype, output_dtype, need_x, need_output
    grad_x, grad_output = empty_gradients(grad_x0, guidance_scale, *needs)
    if need_x or need_output:
        with on(grad_x0.device):
            backward_kernel[(rows * n_pieces,)](
                grad_x0,
                posterior,
                index.contiguous(),
                grad_x if need_x else None,
                grad_output if need_output else None,
                guidance_scale,
                1.0 - guidance_scale,
                rows,
                elements,
                n_pieces,
                len(posterior),
                *posterior.stride(),
                guided,
                BLOCK,
                num_warps=warps(elements),
            )
    return grad_x, grad_output
