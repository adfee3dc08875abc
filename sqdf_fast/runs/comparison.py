"""What a run was planned to take, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sqdf_fast.runs.metrics import Record

FILE = "plan.json"
SAMPLING = "sampling"
GIB = 2**30


@dataclass(frozen=True)
class StageFigures:
    """One stage. None where nothing was planned or measured.

    Attributes:
        planned_bytes, planned_seconds: of the plan, a step.
        measured_bytes: the largest peak of the steps that were measured.
        measured_seconds: their median, so that a first step's warming up does not count; of the sampling, a step's
            share.
        note: what the plan traded in this stage.
    """

    name: str
    planned_bytes: float | None = None
    measured_bytes: float | None = None
    planned_seconds: float | None = None
    measured_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A plan beside the records of the steps.

    Attributes:
        planned: there is a plan that can be read.
        stages: in the plan's order, then those that it does not know.
        planned_peak, measured_peak: bytes of a GPU's allocator, or of a counter of live tensors on a CPU.
        reserve: bytes that the plan leaves free beside its peak.
        planned_seconds, measured_seconds: a step; measured is the mean over all steps, sampling included.
        joules: a step, mean of those that were measured.
        events: (step, what happened to the budget).
        measured_steps: steps whose stages were measured.
    """

    planned: bool
    stages: list[StageFigures]
    planned_peak: float | None
    measured_peak: float | None
    reserve: float | None
    planned_seconds: float | None
    measured_seconds: float | None
    joules: float | None
    events: list[tuple[int, str]]
    measured_steps: int

    def __bool__(self) -> bool:
        """Whether there is anything to show beyond the time of a step, which every run has."""
        return self.planned or bool(self.stages or self.events) or self.joules is not None


def read_plan(folder: Path) -> Record:
    """``plan.json`` of a run folder; empty if the run has none, or one that cannot be read."""
    try:
        plan = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def compare(plan: Mapping[str, Any], steps: Iterable[Record], on_gpu: bool, steps_per_refill: int = 1) -> Comparison:
    """Set ``plan`` against the records of kind "step".

    Args:
        on_gpu: ``memory_bytes`` of the records are a GPU allocator's peak; on a CPU they are the whole process's
            resident memory, which no plan predicts.
        steps_per_refill: one sampling serves so many steps, as the plan's line of it says already.
    """
    steps = list(steps)
    stages = _stages(plan, steps, steps_per_refill)
    peaks = [stage.measured_bytes for stage in stages if stage.measured_bytes is not None]
    if on_gpu:
        peaks += _numbers(steps, "memory_bytes")
    seconds, joules = _numbers(steps, "seconds"), _numbers(steps, "joules")
    return Comparison(
        planned=bool(plan),
        stages=stages,
        planned_peak=_bytes(plan.get("peak_gib")),
        measured_peak=max(peaks, default=None),
        reserve=_bytes(plan.get("reserve_gib")),
        planned_seconds=_number(plan.get("predicted_seconds")),
        measured_seconds=sum(seconds) / len(seconds) if seconds else None,
        joules=sum(joules) / len(joules) if joules else None,
        events=[(step["step"], str(step["budget_event"])) for step in steps if step.get("budget_event")],
        measured_steps=sum(bool(step.get("stages")) for step in steps),
    )


def difference(planned: float | None, measured: float | None) -> str:
    """``measured`` against ``planned`` in per cent, "+3.1%"; empty where one of them is missing."""
    if not planned or measured is None:
        return ""
    return f"{measured / planned - 1:+.1%}"


def _stages(plan: Mapping[str, Any], steps: Iterable[Record], steps_per_refill: int) -> list[StageFigures]:
    peaks, seconds = _measured(steps)
    found = [stage for stage in plan.get("stages") or () if isinstance(stage, Mapping) and "name" in stage]
    planned = {str(stage["name"]): stage for stage in found}
    return [
        StageFigures(
            name,
            _bytes(planned.get(name, {}).get("live_gib")),
            max(peaks.get(name, ()), default=None),
            _number(planned.get(name, {}).get("seconds")),
            median(seconds[name]) / (steps_per_refill if name == SAMPLING else 1) if name in seconds else None,
            str(planned.get(name, {}).get("note") or ""),
        )
        for name in dict.fromkeys([*planned, *seconds])
    ]


def _measured(steps: Iterable[Record]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Peak bytes and seconds of every stage, a number a measured step."""
    peaks: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for step in steps:
        for name, peak, duration in step.get("stages") or ():
            if peak is not None:
                peaks.setdefault(name, []).append(peak)
            seconds.setdefault(name, []).append(duration)
    return peaks, seconds


def _numbers(steps: Iterable[Record], key: str) -> list[float]:
    return [step[key] for step in steps if step.get(key) is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _bytes(gib: Any) -> float | None:
    number = _number(gib)
    return None if number is None else number * GIB
