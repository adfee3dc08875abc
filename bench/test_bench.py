"""Every case of the registry. Without parity a contender fails and has no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.benchmark import Benchmark, Group, Measured, Row
from harness.timing import play


def test_bench(
    benchmarked: Benchmark,
    group: Group,
    contender: str,
    measured: Measured,
    benchmark: Any,
    keep: Callable[[Row], None],
) -> None:
    row = measured.rows[contender]
    if row["fault"]:
        pytest.fail(f"no parity, no number: {row['fault']}", pytrace=False)
    samples = measured.samples[contender]
    benchmark.extra_info.update(row)
    benchmark.pedantic(play(samples), rounds=len(samples))
    keep(row)
