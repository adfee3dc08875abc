"""The AdamW steps on the CPU through the native library, with the arguments and results of reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sqdf_fast.kernels import native
from sqdf_fast.kernels.adamw_8bit.maps import FIRST_CELL, Coefficients, Step, dynamic_map, lookup
from sqdf_fast.kernels.native import dtype_number, unavailable

__all__ = ["sum_of_squares", "unavailable", "update"]


def update(step: Step) -> None:
    """One step; 8-bit states come with absmax1 and absmax2."""
    tensors = (
        step.parameter.data_ptr(),
        dtype_number(step.parameter.dtype),
        step.gradient.data_ptr(),
        dtype_number(step.gradient.dtype),
        step.state1.data_ptr(),
        step.state2.data_ptr(),
    )
    ending = (_array(step.coefficients), step.seed, step.parameter.numel(), native.threads())
    if step.absmax1 is None or step.absmax2 is None:
        native.function("sqdf_fast_adamw_32bit", "pipippplli")(*tensors, *ending)
        return
    native.function("sqdf_fast_adamw_8bit", "pipippppppppiiplli")(
        *tensors,
        step.absmax1.data_ptr(),
        step.absmax2.data_ptr(),
        dynamic_map(True).data_ptr(),
        lookup(True).data_ptr(),
        dynamic_map(False).data_ptr(),
        lookup(False).data_ptr(),
        FIRST_CELL,
        len(lookup(True)),
        *ending,
    )


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Sum over all elements, in float64; tensors are contiguous [n]. Threads do not change the bits."""
    table = torch.tensor(
        [[t.data_ptr() for t in tensors], [dtype_number(t.dtype) for t in tensors], [t.numel() for t in tensors]],
        dtype=torch.int64,
        device="cpu",
    )
    addresses, dtypes, numels = (row.data_ptr() for row in table)
    total: float = native.function("sqdf_fast_sum_of_squares", "pppli", "d")(
        addresses, dtypes, numels, len(tensors), native.threads()
    )
    return total


def _array(coefficients: Coefficients) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(coefficients))(*coefficients)
