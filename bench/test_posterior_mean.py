"""What does the posterior mean under guidance cost, forward and backward?"""

from __future__ import annotations

from collections.abc import Callable

from fused_ops.cases import Case

OP = "posterior_mean"


def test_posterior_mean(case: Case, report: Callable[[Case], None]) -> None:
    report(case)
