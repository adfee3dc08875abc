"""The list of ops. A new op is its folder, its test in tests/kernels/ and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqdf_fast.kernels.spec import Spec

OPS = (
    "denoise_step",
    "posterior_mean",
    "discounted_loss",
    "philox",
    "adamw_8bit",
)


def spec(op: str) -> Spec:
    """What `sqdf_fast.kernels.<op>.spec` declares for the tests, the compile gate and the benchmarks."""
    declared: Spec = importlib.import_module(f"sqdf_fast.kernels.{op}.spec").SPEC
    return declared


def benchmarked() -> tuple[str, ...]:
    """The ops that declare a benchmark."""
    return tuple(op for op in OPS if spec(op).benchmark is not None)
