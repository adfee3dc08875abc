"""What does one denoising step with its KL cost, forward and backward, noise given or drawn?"""

from __future__ import annotations

from collections.abc import Callable

from fused_ops.cases import Case

OP = "denoise_step"


def test_denoise_step(case: Case, report: Callable[[Case], None]) -> None:
    report(case)
