"""Everything that `pytest bench/ --benchmark-only` measures. An op of kernels/ is here by its own declaration."""

from __future__ import annotations

from cases import adamw_8bit, ops, sampling
from cases.training_step import benchmark as training_step
from harness.benchmark import Benchmark, Row, Verdict
from harness.tables import as_lines, table

BENCHMARKS: tuple[Benchmark, ...] = (
    *ops.BENCHMARKS,
    adamw_8bit.BENCHMARK,
    sampling.BENCHMARK,
    training_step.BENCHMARK,
)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Every target that these rows answer, or should."""
    return [verdict for benchmark in BENCHMARKS for verdict in benchmark.verdicts(rows)]


def report(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Title and lines of every table in the terminal."""
    found = []
    for benchmark in BENCHMARKS:
        tables: dict[str, list[Row]] = {}
        for row in rows:
            if row["op"] == benchmark.name:
                toy = ", toy sizes: no figure means anything" if row["toy"] else ""
                tables.setdefault(benchmark.title(row) + toy, []).append(row)
        for title, own in tables.items():
            faults = [f"{row['implementation']}: no parity, no figures: {row['fault']}" for row in own if row["fault"]]
            found.append((title, [*as_lines(table(benchmark.columns, own)), *faults, *benchmark.notes(own)]))
    return found
