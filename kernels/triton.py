"""What the Triton implementations share: availability, the block of a program, how a tensor enters a kernel.

Importing this module works without Triton. Every kernel takes the same block: 1024 elements of one row for
four warps, so that a thread holds 16 bytes of a 16-bit tensor, or twice 16 bytes of a float32 one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: `unavailable` says so
    triton = tl = None

BLOCK = 1024
WARPS = 4


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`; without Triton the function as it is, which is then never called."""
    if triton is not None:
        return triton.jit(function, **options)
    return function or (lambda decorated: decorated)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run there, or None."""
    if triton is None:
        return "triton is not installed: pip install 'sqdf-fast[cuda]'"
    if dtype == torch.float64:
        return "float64 runs in the reference only"
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return "needs a CUDA device"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as a kernel reads it: contiguous, at most 32 bits an element, at a multiple of 16 bytes.

    What is not so is copied. Where a tensor starts decides how a compiled kernel deals a block out to its
    threads, thus the order in which a KL is summed, and a row's bits must not depend on that.
    """
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def pieces(elements: int) -> int:
    """Programs that share a row, by its length alone."""
    return -(-elements // BLOCK)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; this makes `device` it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# Kernels are made for the interpreter or the compiler when they are decorated, not when they run.
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret


@jit
def row_and_elements(n_elements, n_pieces, BLOCK: tl.constexpr):
    """The program's row, its piece of the row, the offsets of its elements in the row, and which of them exist."""
    i_program = tl.program_id(0)
    i_piece = i_program % n_pieces
    o_n = i_piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (i_program // n_pieces).to(tl.int64), i_piece, o_n, o_n < n_elements


@jit
def table_row(table, index, i_row, stride):
    """Where the coefficients of sample i_row start: table[index[i_row]]."""
    return table + tl.load(index + i_row) * stride
