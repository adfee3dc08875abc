"""What does counter-based noise cost against torch.randn?"""

from __future__ import annotations

from collections.abc import Callable

from fused_ops.cases import Case

OP = "philox"


def test_philox(case: Case, report: Callable[[Case], None]) -> None:
    report(case)
