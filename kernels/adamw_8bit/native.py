"""The AdamW steps on the CPU through the native library, with the arguments and results of reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sqdf_fast.kernels import native
from sqdf_fast.kernels.adamw_8bit.maps import FIRST_CELL, Step, dynamic_map, lookup
from sqdf_fast.kernels.native import unavailable

__all__ = ["sum_of_squares", "unavailable", "update"]


def update(step: Step) -> None:
    """One step; 8-bit states come with absmax1 and absmax2."""
    maps = [values.data_ptr() for signed in (True, False) for values in (dynamic_map(signed), lookup(signed))]
    native.function("sqdf_fast_adamw", "pipippppppppiiplli")(
        *native.typed(step.parameter),
        *native.typed(step.gradient),
        *map(native.address, (step.state1, step.state2, step.absmax1, step.absmax2)),
        *maps,
        FIRST_CELL,
        len(lookup(True)),
        (ctypes.c_float * len(step.coefficients))(*step.coefficients),
        step.seed,
        step.parameter.numel(),
        native.threads(),
    )


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Sum over all elements, in float64; tensors are contiguous [n]. Threads do not change the bits."""
    rows = [(*native.typed(tensor), tensor.numel()) for tensor in tensors]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").T.contiguous()
    total: float = native.function("sqdf_fast_sum_of_squares", "pppli", "d")(
        *(row.data_ptr() for row in table), len(tensors), native.threads()
    )
    return total
