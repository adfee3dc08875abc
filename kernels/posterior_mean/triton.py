"""posterior_mean on CUDA: one pass over the latents each way."""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from torch import Tensor

from sqdf_fast.kernels.guidance import empty_gradients
from sqdf_fast.kernels.posterior_mean.reference import Backward, Forward
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


def forward(given: Forward) -> Tensor:
    """See `Forward`."""
    x, model_output, posterior, index, guidance_scale, out_dtype = given
    x, posterior = aligned(x), posterior.float()
    sizes, grid, n_warps = layout(x, posterior)
    x0 = x.new_empty(x.shape, dtype=out_dtype)
    tensors = x, aligned(model_output), posterior, index.contiguous(), x0
    with on(x.device):
        forward_kernel[grid](*tensors, guidance_scale, *sizes, guidance_scale != 1, BLOCK, num_warps=n_warps)
    return x0


def backward(given: Backward) -> tuple[Tensor, Tensor]:
    """See `Backward`."""
    grad_x0, posterior, index, guidance_scale, x_dtype, output_dtype = given
    grad_x0, posterior = aligned(grad_x0), posterior.float()
    sizes, grid, n_warps = layout(grad_x0, posterior)
    grads = empty_gradients(grad_x0, guidance_scale, x_dtype, output_dtype)
    tensors = grad_x0, posterior, index.contiguous(), grads[0] if x_dtype else None, grads[1] if output_dtype else None
    scales = guidance_scale, 1.0 - guidance_scale
    if x_dtype or output_dtype:
        with on(grad_x0.device):
            backward_kernel[grid](*tensors, *scales, *sizes, guidance_scale != 1, BLOCK, num_warps=n_warps)
    return grads
