"""The dynamic maps that codes index, the search for a code, and the arguments of a step."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one absmax."""

ZERO_CODE = 127
"""The code of 0 in the signed map; 127 negative values lie below it, 128 positive ones above."""

FIRST_CELL = (127 - 24) << 7
"""Upper half word of 2^-24, below which every value has the code of 0."""

_CELLS = (127 << 7) - FIRST_CELL + 1
_DECADES = 7


class Coefficients(NamedTuple):
    """Factors of one step, rounded to float32 where they are used; g is the gradient, p the parameter.

    m <- beta1 m + complement1 (gradient_scale g)
    v <- beta2 v + complement2 (gradient_scale g)^2
    p <- decay p - step_size m / (root sqrt(v) + eps)
    """

    gradient_scale: float
    beta1: float
    complement1: float
    beta2: float
    complement2: float
    root: float
    eps: float
    step_size: float
    decay: float

    @staticmethod
    def of(
        step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, gradient_scale: float
    ) -> Coefficients:
        """Factors of step 1, 2, ... with bias correction (Kingma, Ba, ICLR 2015) and decoupled weight decay
        (Loshchilov, Hutter, ICLR 2019)."""
        return Coefficients(
            gradient_scale=gradient_scale,
            beta1=beta1,
            complement1=1 - beta1,
            beta2=beta2,
            complement2=1 - beta2,
            root=1 / math.sqrt(1 - beta2**step),
            eps=eps,
            step_size=lr / (1 - beta1**step),
            decay=1 - lr * weight_decay,
        )


class Step(NamedTuple):
    """Arguments of one step of a parameter [n]; parameter, states and absmax are contiguous and updated in place.

    Attributes:
        state1, state2: codes of the moments, uint8 [n], or without absmax the moments, float32 [n].
        absmax1, absmax2: float32 [ceil(n / 256)].
        seed: seed for stochastic rounding of a bfloat16 parameter.
    """

    parameter: Tensor
    gradient: Tensor
    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None
    coefficients: Coefficients
    seed: int


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of codes 0 .. 255, float32, ascending: the larger the decade, the finer.

    Decade d = -6 .. 0 is cut into 2^(d + 6) equal parts (unsigned: twice as many) whose midpoints are values; 0 and 1
    are added. The values are those of bitsandbytes (`functional.create_dynamic_map`).
    """
    magnitudes = []
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        magnitudes += (10.0 ** (decade - _DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in magnitudes] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *magnitudes, 1.0]), dtype=torch.float32, device="cpu")


@cache
def boundaries(signed: bool) -> Tensor:
    """Midpoints between neighboring magnitudes of the map, float32, ascending."""
    magnitudes = dynamic_map(signed)[ZERO_CODE if signed else 0 :]
    return (magnitudes[:-1] + magnitudes[1:]) / 2


@cache
def lookup(signed: bool) -> Tensor:
    """The search among `boundaries` as a table for the library, int32 [cells].

    A cell is all floats with one upper half word, `FIRST_CELL` and up; at most one boundary lies in it. The upper half
    of its entry is the magnitude nearest to its lowest float, the lower half the lower half word of the boundary.
    """
    words = torch.arange(FIRST_CELL, FIRST_CELL + _CELLS, dtype=torch.int32, device="cpu") << 16
    lowest, highest = words.view(torch.float32), (words | 0xFFFF).view(torch.float32)
    bounds = boundaries(signed)
    level, above = torch.bucketize(lowest, bounds), torch.bucketize(highest, bounds)
    inside = bounds[level.clamp(max=len(bounds) - 1)].view(torch.int32) & 0xFFFF
    return ((level << 16) | torch.where(above > level, inside, 0xFFFF)).to(torch.int32)
