"""AdamW steps with moments of one byte each, for parameters in float32 and bfloat16.

Moments are quantized in blocks of 256 elements. Each block has a float32 absmax; each element has a code, an index into
the signed dynamic map (first moment) or the unsigned one (second moment). Maps and layout are those of bitsandbytes'
AdamW8bit, so states can be exchanged. bfloat16 parameters are rounded stochastically: a step much smaller than the last
bit still moves the parameter now and then. Nothing depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.adamw_8bit.maps import BLOCK, Coefficients, Step, dynamic_map
from sqdf_fast.kernels.adamw_8bit.reference import round_stochastically
from sqdf_fast.kernels.dispatch import module, resolve

__all__ = [
    "BLOCK",
    "Coefficients",
    "adamw_8bit",
    "adamw_32bit",
    "dynamic_map",
    "round_stochastically",
    "sum_of_squares",
]

_PARAMETERS = (torch.float32, torch.bfloat16)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    *,
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """One AdamW step in place, arithmetic in float32.

    The moments are those of the state with the gradient added, not yet requantized, when the parameter is updated.

    Args:
        parameter: float32 or bfloat16, contiguous, n elements.
        gradient: float32, bfloat16 or float16, contiguous, n elements; left unchanged.
        state1, state2: codes of the first and second moment, uint8, contiguous, n elements.
        absmax1, absmax2: float32 [ceil(n / 256)]; zeros before the first step.
        coefficients: `Coefficients.of` the step.
        seed: Seed for stochastic rounding of a bfloat16 parameter, a new one for every tensor and step.
        impl: "auto", "native" (CPU) or "reference".

    Raises:
        UserError: dtypes, sizes, devices or memory layouts that do not fit, an `impl` that cannot run.
    """
    _check("adamw_8bit", parameter, gradient, torch.uint8, state1=state1, state2=state2)
    blocks = -(-parameter.numel() // BLOCK)
    for name, absmax in (("absmax1", absmax1), ("absmax2", absmax2)):
        if absmax.dtype != torch.float32 or tuple(absmax.shape) != (blocks,) or absmax.device != parameter.device:
            raise UserError(
                f"adamw_8bit: {name} is {absmax.dtype} {tuple(absmax.shape)} on {absmax.device}; "
                f"it must be float32 [{blocks}] on {parameter.device}, one per block of {BLOCK} elements"
            )
    _update(parameter, gradient, state1, state2, absmax1, absmax2, coefficients, seed, impl)


def adamw_32bit(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    coefficients: Coefficients,
    *,
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """`adamw_8bit` with moments that are not quantized: state1 and state2 float32, contiguous, n elements."""
    _check("adamw_32bit", parameter, gradient, torch.float32, state1=state1, state2=state2)
    _update(parameter, gradient, state1, state2, None, None, coefficients, seed, impl)


def sum_of_squares(tensors: Sequence[Tensor], *, impl: str = "auto") -> float:
    """The sum of squares of all elements of all tensors, accumulated in float64.

    Args:
        tensors: float32, bfloat16 or float16, contiguous, all on one device.
        impl: "auto", "native" (CPU) or "reference".

    Raises:
        UserError: another dtype or layout, an `impl` that cannot run.
    """
    for tensor in tensors:
        if tensor.dtype not in _GRADIENTS or not tensor.is_contiguous():
            raise UserError(
                f"sum_of_squares: a tensor is {tensor.dtype} with strides {tuple(tensor.stride())}; tensors must be "
                "contiguous and float32, bfloat16 or float16"
            )
    if not tensors:
        return 0.0
    name = resolve("adamw_8bit", impl, tensors[0].device, torch.float32)
    total: float = module("adamw_8bit", name).sum_of_squares([tensor.detach().view(-1) for tensor in tensors])
    return total


# A plain definition: the wrapper of torch.library.custom_op costs more than the step of a small parameter.
torch.library.define(
    "sqdf_fast::adamw",
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) state1, Tensor(c!) state2, Tensor(d!)? absmax1, "
    "Tensor(e!)? absmax2, float[] coefficients, int seed, str impl) -> ()",
)
torch.library.register_fake("sqdf_fast::adamw", lambda *given: None)


@torch.library.impl("sqdf_fast::adamw", ("CPU", "CUDA"))
def _run(*given: Any) -> None:
    *tensors, coefficients, seed, impl = given
    module("adamw_8bit", impl).update(Step._make([*tensors, Coefficients(*coefficients), seed]))


def _update(*given: Any) -> None:
    *tensors, coefficients, seed, impl = given
    impl = resolve("adamw_8bit", impl, tensors[0].device, torch.float32)
    flat = (None if tensor is None else tensor.view(-1) for tensor in tensors)
    torch.ops.sqdf_fast.adamw.default(*flat, coefficients, seed, impl)


def _check(op: str, parameter: Tensor, gradient: Tensor, state_dtype: torch.dtype, **states: Tensor) -> None:
    allowed = {"parameter": _PARAMETERS, "gradient": _GRADIENTS, **dict.fromkeys(states, (state_dtype,))}
    for name, tensor in {"parameter": parameter, "gradient": gradient, **states}.items():
        if tensor.dtype not in allowed[name]:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[name])
            raise UserError(f"{op}: {name} is {tensor.dtype}; it must be one of {names}")
        if tensor.numel() != parameter.numel() or tensor.device != parameter.device or not tensor.is_contiguous():
            raise UserError(
                f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())} on "
                f"{tensor.device}; it must be contiguous, with {parameter.numel()} elements on {parameter.device}"
            )
