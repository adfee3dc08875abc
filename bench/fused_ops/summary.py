"""Ratios, tables and verdicts, from rows as they stand in a benchmark's extra_info and in a recorded file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fused_ops import traffic
from fused_ops.cases import Case
from fused_ops.measure import Measured

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """At least `least` of `figure`, for our implementations' rows whose fields equal `fields`."""

    figure: str
    least: float
    fields: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """A target and what a run says to it; `value` None: not measured."""

    subject: str
    unit: str
    least: float
    value: float | None

    @property
    def met(self) -> bool:
        return self.value is not None and self.value >= self.least

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.subject}: {self.unit} at least {self.least:g}, NOT MEASURED"
        return (
            f"{self.subject}: {self.value:.2f} {self.unit}, at least {self.least:g}, {'met' if self.met else 'NOT MET'}"
        )


def _both(device: str, implementation: str, **fields: str) -> dict[str, str]:
    return {
        "op": "denoise_step",
        "direction": "both",
        "device": device,
        "implementation": implementation,
        **fields,
    }


def _targets() -> list[Target]:
    found = []
    for noise in ("given", "drawn"):
        cpu = _both("cpu", "native", dtype="float32", noise=noise)
        for size in ("sd15", "sdxl", "video"):
            found.append(Target("times_eager", 3.0, {**cpu, "size": size}))
            if noise == "given":
                found.append(Target("times_compile", 1.2, {**cpu, "size": size}))
        found.append(Target("copy_fraction", 0.7, {**cpu, "size": "beyond-cache"}))
        for dtype in ("float32", "bfloat16"):
            cuda = _both("cuda", "triton", dtype=dtype, noise=noise)
            found.append(Target("times_eager", 5.0, {**cuda, "size": "sd15"}))
            found.append(Target("times_compile", 1.3, {**cuda, "size": "sd15"}))
            found.append(Target("copy_fraction", 0.9, {**cuda, "size": "beyond-cache"}))
    return found


TARGETS = _targets()

_UNITS = {"times_eager": "x eager", "times_compile": "x torch.compile", "copy_fraction": "of the copy bandwidth"}


def row(case: Case, measured: Measured, toy: bool) -> Row:
    """What is recorded of a case that was measured: all figures are of medians."""
    problem, name = case.problem, case.implementation
    medians = {other: statistics.median(samples) for other, samples in measured.samples.items()}
    moved = traffic.bytes_moved(problem, case.direction)
    copy = moved // 2 * 2 / statistics.median(measured.copy) / 1e9 if measured.copy else None
    achieved = moved / medians[name] / 1e9 if moved else None
    return {
        "op": problem.op,
        "implementation": name,
        "direction": case.direction,
        "device": problem.device,
        "size": problem.size,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "noise": problem.noise,
        "toy": toy,
        "median_seconds": medians[name],
        "spread": spread(measured.samples[name]),
        "bytes_moved": moved,
        "bytes_formula": traffic.formula(problem, case.direction),
        "gb_per_second": achieved,
        "copy_gb_per_second": copy,
        "copy_fraction": achieved / copy if achieved and copy else None,
        "times_eager": ratio(medians, "eager", name),
        "times_compile": ratio(medians, "compile", name),
        "peak_bytes": measured.peaks[name],
    }


def spread(samples: list[float]) -> float:
    """Interquartile range over median: what is left of a quiet machine is a few per cent."""
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / statistics.median(samples)


def ratio(medians: dict[str, float], baseline: str, name: str) -> float | None:
    """How many times as fast as the baseline; None where the baseline was not measured."""
    return medians[baseline] / medians[name] if baseline in medians else None


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every target of a device that was measured, met or not, in the order of `TARGETS`."""
    rows = list(rows)
    devices = {row["device"] for row in rows}
    found = []
    for target in TARGETS:
        if target.fields["device"] not in devices:
            continue
        answers = [row for row in rows if all(row[name] == value for name, value in target.fields.items())]
        value = answers[0][target.figure] if answers else None
        found.append(Verdict(_describe(target), _UNITS[target.figure], target.least, value))
    return found


def _describe(target: Target) -> str:
    """For the fields as `_both` makes them."""
    fields = target.fields
    what = f"{fields['op']} forward + backward, {fields['size']} {fields['dtype']}, noise {fields['noise']}"
    return f"{what}, {fields['implementation']}"


def noise(rows: Iterable[Row]) -> str:
    """How far the machine can be trusted."""
    spreads = sorted(row["spread"] for row in rows)
    beyond = sum(value > 0.2 for value in spreads)
    return (
        f"spread (interquartile range over median): {statistics.median(spreads):.0%} in the middle, "
        f"above 20% in {beyond} of {len(spreads)} rows; the more, the busier the machine was"
    )


HEADER = (
    *("size", "dtype", "noise", "direction", "implementation"),
    *("time", "spread", "x eager", "x compile", "GB/s", "of copy", "peak"),
)


def cells(row: Row) -> list[str]:
    """A row as text under `HEADER`."""
    return [
        row["size"],
        row["dtype"],
        row["noise"] or "-",
        row["direction"],
        row["implementation"],
        duration(row["median_seconds"]),
        f"{row['spread']:.0%}",
        _factor(row, "times_eager"),
        _factor(row, "times_compile"),
        "-" if row["gb_per_second"] is None else f"{row['gb_per_second']:.1f}",
        "-" if row["copy_fraction"] is None else f"{row['copy_fraction']:.0%}",
        f"{row['peak_bytes'] / 2**20:.1f} MiB",
    ]


def table(rows: Iterable[Row]) -> list[str]:
    """Aligned lines, one a row, under `HEADER`; what repeats from the line above is left out."""
    content = [list(HEADER), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in content) for column in range(len(HEADER))]
    lines, above = [], [""] * 4
    for line in content:
        shown = ["" if line[:4] == above and column < 4 else cell for column, cell in enumerate(line)]
        above = line[:4]
        lines.append(
            "  ".join(
                cell.ljust(width) if column < 5 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(shown, widths, strict=True))
            ).rstrip()
        )
    return lines


def by_op(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows grouped by (op, device), in the order they come."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["device"]), []).append(row)
    return groups


def _factor(row: Row, figure: str) -> str:
    # A baseline against itself says nothing.
    if row[figure] is None or figure == f"times_{row['implementation']}":
        return "-"
    return f"{row[figure]:.2f}"


def duration(seconds: float) -> str:
    """Seconds as text."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
