"""Where the tests of the fused ops run: every implementation on every device that this process has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sqdf_fast.kernels import native, registry
from sqdf_fast.kernels.dispatch import reason_against

OPS = tuple(op for op in registry.OPS if registry.spec(op).launches is not None)
"""The ops with a Triton implementation."""

BUDGET = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative L2 error of a sample that a dtype is allowed; a fused kernel also twice what the reference errs."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs Triton's kernels in its interpreter, on the CPU, an element at a time."""

slow_interpreted = [pytest.mark.slow] if INTERPRETED else []
"""Marks of a case that only the interpreter takes long for."""


def slow_when_interpreted(test: Any) -> Any:
    """`slow_interpreted` for a test function."""
    return pytest.mark.slow(test) if INTERPRETED else test


@dataclass(frozen=True)
class Target:
    """An implementation on a device."""

    device: str
    impl: str

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What it computes; float64 is the reference's alone."""
        return tuple(BUDGET) if self.impl == "reference" else tuple(BUDGET)[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The most precise of them."""
        return self.dtypes[0]

    def runs(self, op: str) -> bool:
        """Whether the op has this implementation."""
        return reason_against(op, self.impl, torch.device(self.device), torch.float32) is None

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}"


def targets() -> list[Target]:
    """Under Triton's interpreter the Triton kernels, on the CPU; otherwise all but them, and on a GPU them too."""
    if INTERPRETED:
        return [Target("cpu", "triton")]
    found = [Target("cpu", "reference")]
    if native.available():
        found.append(Target("cpu", "native"))
    if torch.cuda.is_available():
        found += [Target("cuda", "reference"), Target("cuda", "triton")]
    return found


def fused_targets() -> list[Target]:
    """Those that are PyTorch operators of ours; the reference consists of PyTorch's own."""
    return [target for target in targets() if target.impl != "reference"]


def relative_error(value: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 error of each sample, [B] float64 on the CPU; 0 where both are 0."""
    truth = truth.detach().cpu().reshape(len(truth), -1).double()
    error = (value.detach().cpu().reshape(len(truth), -1).double() - truth).norm(dim=1)
    return torch.where(error == 0, error, error / truth.norm(dim=1))


def assert_within_budget(
    value: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    reference: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    """Each sample's error is inside the budget of `dtype`, plus twice the error of `reference` when given.

    `terms` is the size [B, 1] of what cancels in a sample: the budget is then relative to it.
    """
    error, limit = relative_error(value, truth), torch.full((len(truth),), BUDGET[dtype], dtype=torch.float64)
    if terms is not None:
        norm = truth.detach().reshape(len(truth), -1).double().norm(dim=1)
        limit = torch.where(norm == 0, limit, limit * (norm + terms[:, 0]) / norm)
    if reference is not None:
        limit = limit + 2 * relative_error(reference, truth)
    worst = (error - limit).argmax()  # a NaN counts as the largest
    assert error[worst] <= limit[worst], f"sample {worst}: relative error {error[worst]:.3g} above {limit[worst]:.3g}"


def without_gradient(tensor: Tensor) -> Tensor:
    """The same values; the gradient that arrives is zero."""
    return tensor.detach() + 0 * tensor
