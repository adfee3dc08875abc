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
    """What is asked for.

    Attributes:
        device: "cpu" or "cuda".
        toy: tiny and few: does it run, not how fast.
        models: models of the training step; empty: those that suit the device.
    """

    device: str
    toy: bool
    models: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Contenders that take turns, so that their times can be compared.

    Attributes:
        name: device and sizes; unique in a benchmark.
        contenders: our implementations, eager PyTorch, torch.compile, the published way, ...
        fields: what a row records of the group: device, size, dtype, ...
        problem: what the benchmark itself has to know.
    """

    name: str
    contenders: tuple[str, ...]
    fields: Mapping[str, Any]
    problem: Any = None

    @property
    def device(self) -> str:
        return str(self.fields["device"])


@dataclass(frozen=True)
class Prepared:
    """A group that is ready to be timed.

    Attributes:
        subjects: what is timed, the contenders inside the error budget among it.
        faults: why the other contenders have no figures.
        pace: how long they are timed.
        figures: (contender, medians in seconds of all subjects) -> further fields of its row.
        compare: adds to sound rows, by contender, what follows from several of them.
        known: fields of each row, faults or not.
    """

    subjects: Mapping[str, Subject]
    faults: Mapping[str, str]
    pace: Pace
    figures: Callable[[str, Mapping[str, float]], Row]
    compare: Callable[[dict[str, Row]], None] = lambda rows: None
    known: Callable[[str], Row] = lambda name: {}


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
    """An entry of the registry.

    Attributes:
        name: recorded as `op` of its rows.
        page: the page in docs/ that shows its recorded rows.
        groups: what is measured of it.
        prepare: (group, toy) -> the group ready to be timed.
        columns: its table in the terminal.
        tables: its rows of one device -> tables of the page.
        verdicts: rows of any benchmark -> its targets.
        title: a row -> what is above its table in the terminal.
        notes: the rows of a table -> lines below it.
    """

    name: str
    page: str
    groups: Callable[[Choice], Iterable[Group]]
    prepare: Callable[[Group, bool], Prepared]
    columns: tuple[Column, ...]
    tables: Callable[[list[Row]], list[Table]]
    verdicts: Callable[[list[Row]], list[Verdict]] = lambda rows: []
    title: Callable[[Row], str] = lambda row: f"{row['op']} on {row['device']}, medians"
    notes: Callable[[list[Row]], list[str]] = lambda rows: []


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


def target(subject: str, value: float | None, unit: str, least: float) -> Verdict:
    """A figure that has to be at least `least`; None: not measured."""
    if value is None:
        return Verdict(f"{subject}: {unit} at least {least:g}, NOT MEASURED", False)
    met = value >= least
    return Verdict(f"{subject}: {value:.2f} {unit}, at least {least:g}, {'met' if met else 'NOT MET'}", met)


def noise(rows: Iterable[Row]) -> str:
    """How far the machine can be trusted."""
    spreads = sorted(row["spread"] for row in rows)
    beyond = sum(value > 0.2 for value in spreads)
    return (
        f"spread (interquartile range over median): {statistics.median(spreads):.0%} in the middle, "
        f"above 20% in {beyond} of {len(spreads)} rows; the more, the busier the machine was"
    )
