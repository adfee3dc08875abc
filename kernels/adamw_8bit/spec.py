"""What adamw_8bit declares. It runs on the CPU alone; bench/ measures it through the optimizers that call it."""

from __future__ import annotations

import torch

from sqdf_fast.kernels import spec
from sqdf_fast.kernels.adamw_8bit import BLOCK, Coefficients
from sqdf_fast.kernels.spec import Spec


def operator_calls(device: str) -> spec.Calls:
    numel = BLOCK + 44
    parameter, gradient, *moments = (torch.randn(numel, device=device).abs() for _ in range(4))
    codes = [torch.zeros(numel, dtype=torch.uint8, device=device) for _ in range(2)]
    absmax = [torch.zeros(2, device=device) for _ in range(2)]
    coefficients = list(Coefficients.of(1, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0))
    return {
        f"adamw, {bits} bits, {impl}": (
            torch.ops.sqdf_fast.adamw,
            (parameter, gradient, *states, coefficients, 0, impl),
        )
        for bits, states in ((8, (*codes, *absmax)), (32, (*moments, None, None)))
        for impl in ("reference", "native")
    }


SPEC = Spec(operator_calls)
