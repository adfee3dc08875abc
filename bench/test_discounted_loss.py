"""What does the scalar loss cost? It moves next to nothing: this is about launches and calls."""

from __future__ import annotations

from collections.abc import Callable

from fused_ops.cases import Case

OP = "discounted_loss"


def test_discounted_loss(case: Case, report: Callable[[Case], None]) -> None:
    report(case)
