"""Which implementation of an op runs.

An implementation of the op OP is the module `sqdf_fast.kernels.OP.NAME`, NAME one of `IMPLEMENTATIONS`. A module other
than the reference defines `unavailable(device, dtype) -> str | None`: why it cannot run there, or None. Adding an
implementation means adding that module: nothing here changes, and no caller.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch

from sqdf_fast.errors import UserError

IMPLEMENTATIONS = ("triton", "native", "reference")  # the order in which "auto" tries them
CHOICES = ("auto", *IMPLEMENTATIONS)

_log = logging.getLogger(__name__)


def reason_against(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `name` cannot run `op` on `device` with a math precision of `dtype`; None if it can."""
    if name == "reference":
        return None
    if importlib.util.find_spec(f"sqdf_fast.kernels.{op}.{name}") is None:
        return f"{op} has no such implementation"
    reason: str | None = module(op, name).unavailable(device, dtype)
    return reason


@torch.compiler.assume_constant_result  # chosen once, while tracing: the graph holds the chosen op only
def resolve(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of `op` that `impl` selects for tensors on `device` with a math precision of `dtype`.

    "auto" takes the first that can run and logs once why it skipped the others.

    Raises:
        UserError: unknown `impl`, or an explicit choice that cannot run here.
    """
    return _resolve(op, impl, device.type, dtype)


@cache
def fused(op: str, device_type: str) -> str:
    """The fused implementation of `op` on a device, the one kernel that its PyTorch operators have there.

    Raises:
        UserError: none runs there.
    """
    name = _first_that_runs(_reasons(op, device_type, torch.float32))
    if name == "reference":
        raise UserError(f"{op} has no fused kernel that runs on {device_type}; use impl='reference'")
    return name


@cache
def module(op: str, name: str) -> ModuleType:
    """The module of one implementation."""
    return importlib.import_module(f"sqdf_fast.kernels.{op}.{name}")


@cache
def _resolve(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    if impl not in CHOICES:
        raise UserError(f"impl={impl!r} is not an implementation of {op}: choose one of {', '.join(CHOICES)}")
    reasons = _reasons(op, device_type, dtype)
    name = _first_that_runs(reasons)
    if impl == "auto":
        if skipped := [f"{other}: {reasons[other]}" for other in IMPLEMENTATIONS[: IMPLEMENTATIONS.index(name)]]:
            # on a GPU the reference is several times slower than what was skipped
            level = logging.WARNING if device_type == "cuda" and name == "reference" else logging.INFO
            _log.log(level, "%s on %s takes %s (%s)", op, device_type, name, "; ".join(skipped))
        return name
    reason = reasons.get(impl)
    if reason is None and impl not in (name, "reference"):
        reason = f"{name} takes its place"  # under Triton's interpreter, which runs on the CPU
    if reason is not None:
        raise UserError(f"impl={impl!r} of {op} cannot run here: {reason}; use impl='auto'")
    return impl


def _reasons(op: str, device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Of the fused implementations; the reference runs everywhere."""
    device = torch.device(device_type)
    return {name: reason_against(op, name, device, dtype) for name in IMPLEMENTATIONS if name != "reference"}


def _first_that_runs(reasons: dict[str, str | None]) -> str:
    return next((name for name, reason in reasons.items() if reason is None), "reference")
