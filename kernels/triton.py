"""What the Triton implementations share: availability, the block of a program, how a tensor enters a kernel.

Importing this module works without Triton. `BLOCK` and `WARPS` are the whole configuration: every kernel that streams
samples uses them on every GPU. They were chosen by the compiled code (bench/results/kernel_registers.md), not by timing
on a GPU.
"""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: `unavailable` says so
    triton = tl = None

__all__ = [
    "BLOCK",
    "aligned",
    "jit",
    "layout",
    "on",
    "piece_of_row",
    "pieces",
    "table_row",
    "tl",
    "unavailable",
    "warps",
]

BLOCK = 1024
"""Elements of one row that a program handles: with four warps a thread holds 16 bytes of a 16-bit tensor, or two times
16 bytes of a float32 one."""

WARPS = {"aligned": 4, "ragged": 8}
"""Warps of a program, for rows of a multiple of 16 elements and for others. The latter are read element by element,
which takes registers: more threads then handle fewer elements each."""


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`; without Triton the function itself, which is then never called."""
    if triton is not None:
        return triton.jit(function, **options)
    return function or (lambda decorated: decorated)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if triton is None:
        return "triton is not installed: pip install 'sqdf-fast[cuda]'"
    if dtype == torch.float64:
        return "float64 runs in the reference only"
    if _INTERPRETED and device.type == "cpu":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: install gcc or set CC"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as a kernel reads it, copied if necessary: contiguous, at most 32 bits per element, 16-byte aligned.

    The alignment of a tensor decides how a compiled kernel distributes a block over its threads, and so the order in
    which a KL is summed. A row's bits must not depend on it.
    """
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def pieces(elements: int) -> int:
    """Number of programs that share a row, from its length alone."""
    return -(-elements // BLOCK)


def warps(elements: int) -> int:
    """Warps of a program, from the length of a row alone."""
    return WARPS["aligned" if elements % 16 == 0 else "ragged"]


def layout(x: Tensor, table: Tensor) -> tuple[tuple[int, ...], tuple[int], int]:
    """Sizes, grid and warps of a kernel that computes every sample of x [B, ...] from its row of a table.

    The sizes are samples, elements per sample, programs per sample, steps and strides of the table.
    """
    rows = len(x)
    elements = x.numel() // rows
    n_pieces = pieces(elements)
    sizes = rows, elements, n_pieces, len(table), *table.stride()
    return sizes, (rows * n_pieces,), warps(elements)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# Kernels are made for the interpreter or the compiler when they are decorated, not when they run.
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret


@jit
def piece_of_row(n_elements, n_pieces, BLOCK: tl.constexpr):
    """The program's row, its piece of the row, where that piece starts in [B, N], its elements and which exist."""
    i_program = tl.program_id(0)
    i_row, i_piece = (i_program // n_pieces).to(tl.int64), i_program % n_pieces
    i_start = i_piece.to(tl.int64) * BLOCK
    o_n = tl.arange(0, BLOCK)
    # all that is 64 bits wide is a scalar
    n_left = tl.minimum(n_elements - i_start, BLOCK).to(tl.int32)
    return i_row, i_piece, i_row * n_elements + i_start, o_n, o_n < n_left


@jit
def table_row(table, index, i_row, n_steps, stride):
    """Where the coefficients of sample i_row start, and whether its index is one of the table's; -1 is the last."""
    i_step = tl.load(index + i_row)
    i_step = tl.where(i_step < 0, i_step + n_steps, i_step)
    return table + i_step * stride, (i_step >= 0) & (i_step < n_steps)


@jit
def coefficient(p_row, m_row, offset):
    """One coefficient; NaN for an index outside the table: a kernel cannot raise and must not read outside."""
    return tl.load(p_row + offset, mask=m_row, other=float("nan"))
