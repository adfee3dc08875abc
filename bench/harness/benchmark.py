"""What a benchmark declares, and the one runner: parity first, then interleaved times, memory and further figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.meters import peak_bytes
from harness.tables import Column, Table
from harness.timing import Pace, Subject, interleave, spread

Row = dict[str, Any]
"""What is recorded of a contender: a benchmark's extra_info, a line of a file in bench/results/."""


class Choice(NamedTuple):
    """What is asked for."""

    device: str  # "cpu" or "cuda"
    toy: bool  # tiny and few: does it run, not how fast
    models: tuple[str, ...] = ()  # of the training step; empty: those that suit the device


@dataclass(frozen=True, eq=False)
class Group:
    """Contenders that take turns, so that their times can be compared."""

    name: str  # device and sizes; unique in a benchmark
    contenders: tuple[str, ...]  # our implementations, eager PyTorch, torch.compile, the published way, ...
    fields: Mapping[str, Any]  # what a row records of the group: device, size, dtype, ...
    problem: Any = None  # what the benchmark itself has to know

    @property
    def device(self) -> str:
        return str(self.fields["device"])


@dataclass(frozen=True)
class Prepared:
    """A group that is ready to be timed."""

    subjects: Mapping[str, Subject]  # what is timed: the contenders inside the error budget, and yardsticks
    faults: Mapping[str, str]  # why the other contenders have no figures
    pace: Pace
    figures: Callable[[str, Mapping[str, float]], Row]  # (contender, median seconds of all subjects) -> more of its row
    compare: Callable[[dict[str, Row]], None] = lambda rows: None  # adds what follows from several sound rows
    known: Callable[[str], Row] = lambda name: {}  # fields of each row, faults or not


class Verdict(NamedTuple):
    """A target with what was measured, as a sentence."""

    text: str
    met: bool


class Measured(NamedTuple):
    """Of a group: a row of each contender, and the samples of those that have no fault, in seconds."""

    rows: dict[str, Row]
    samples: dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """An entry of the registry."""

    name: str  # recorded as `op` of its rows
    page: str  # the page in docs/ that shows its recorded rows
    groups: Callable[[Choice], Iterable[Group]]
    prepare: Callable[[Group, bool], Prepared]  # (group, toy)
    columns: tuple[Column, ...]  # its table in the terminal
    tables: Callable[[list[Row]], list[Table]]  # its rows of one device -> tables of the page
    verdicts: Callable[[list[Row]], list[Verdict]] = lambda rows: []  # rows of any benchmark -> its targets
    title: Callable[[Row], str] = lambda row: (
        f"{row['op']} on {row['device']}, medians"
    )  # above a table, in the terminal
    notes: Callable[[list[Row]], list[str]] = lambda rows: []  # the rows of a table -> lines below it


def measure(benchmark: Benchmark, group: Group, toy: bool) -> Measured:
    """Measure all contenders of a group together."""
    ready = benchmark.prepare(group, toy)
    samples = interleave(ready.subjects, group.device, ready.pace)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    rows = {}
    for name in group.contenders:
        rows[name] = {"op": benchmark.name, "implementation": name, **group.fields, "toy": toy}
        rows[name] |= {"fault": ready.faults.get(name), **ready.known(name)}
        if name in samples:
            rows[name] |= {"median_seconds": medians[name], "spread": spread(samples[name])}
            rows[name] |= ready.figures(name, medians)
            if "peak_bytes" not in rows[name]:
                rows[name]["peak_bytes"] = peak_bytes(ready.subjects[name], group.device)
    ready.compare({name: row for name, row in rows.items() if name in samples})
    return Measured(rows, {name: samples[name] for name in group.contenders if name in samples})


def ratio(medians: Mapping[str, float], baseline: str, name: str) -> float | None:
    """How many times as fast as the baseline; None where the baseline was not measured."""
    return medians[baseline] / medians[name] if baseline in medians else None


def verdict(text: str, met: bool) -> Verdict:
    """A target and whether it is met."""
    return Verdict(f"{text}, {'met' if met else 'NOT MET'}", met)


def target(subject: str, value: float | None, unit: str, least: float) -> Verdict:
    """A figure that has to be at least `least`; None: not measured."""
    if value is None:
        return Verdict(f"{subject}: {unit} at least {least:g}, NOT MEASURED", False)
    return verdict(f"{subject}: {value:.2f} {unit}, at least {least:g}", value >= least)


def noise(rows: Iterable[Row]) -> str:
    """How far the machine can be trusted."""
    spreads = sorted(row["spread"] for row in rows)
    beyond = sum(value > 0.2 for value in spreads)
    return (
        f"spread (interquartile range over median): {statistics.median(spreads):.0%} in the middle, "
        f"above 20% in {beyond} of {len(spreads)} rows; the more, the busier the machine was"
    )
