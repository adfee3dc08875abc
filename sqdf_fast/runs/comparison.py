"""What a run was planned to take, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sqdf_fast.runs.metrics import Record

FILE = "plan.json"
SAMPLING = "sampling"
GIB = 2**30


@dataclass(frozen=True)
class Measure:
    """A figure of the plan beside the measured one; None where unknown."""

    planned: float | None = None
    measured: float | None = None

    @property
    def difference(self) -> str:
        """The measured figure against the planned one, "+3.1%"; empty where one of them is missing."""
        if not self.planned or self.measured is None:
            return ""
        return f"{self.measured / self.planned - 1:+.1%}"


@dataclass(frozen=True)
class StageFigures:
    """One stage of a step.

    Attributes:
        memory: bytes; measured is the largest peak of the steps that were measured.
        seconds: measured is their median, so that a first step's warm-up does not count; of the sampling, a step's
            share.
        note: what the plan traded in this stage.
    """

    name: str
    memory: Measure = Measure()
    seconds: Measure = Measure()
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A plan beside the records of the steps.

    Attributes:
        planned: a readable plan exists.
        stages: in the plan's order, then those that it does not know.
        peak: bytes of a GPU's allocator, or of a counter of live tensors on a CPU.
        seconds: of a step; measured is the mean over all steps, sampling included.
        reserve: bytes that the plan leaves free beside its peak.
        joules: of a step, mean of those that were measured.
        events: (step, what happened to the budget).
        measured_steps: steps whose stages were measured.
    """

    planned: bool
    stages: list[StageFigures]
    peak: Measure
    seconds: Measure
    reserve: float | None
    joules: float | None
    events: list[tuple[int, str]]
    measured_steps: int

    @property
    def over_budget(self) -> bool:
        """Whether the measured peak exceeds the planned one by more than the reserve."""
        planned, measured = self.peak.planned, self.peak.measured
        return planned is not None and measured is not None and measured > planned + (self.reserve or 0)

    def __bool__(self) -> bool:
        """Whether anything was planned or measured beyond the time of a step, which every run has."""
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
    peaks = [stage.memory.measured for stage in stages if stage.memory.measured is not None]
    if on_gpu:
        peaks += _numbers(steps, "memory_bytes")
    seconds, joules = _numbers(steps, "seconds"), _numbers(steps, "joules")
    return Comparison(
        planned=bool(plan),
        stages=stages,
        peak=Measure(_bytes(plan.get("peak_gib")), max(peaks, default=None)),
        seconds=Measure(_number(plan.get("predicted_seconds")), fmean(seconds) if seconds else None),
        reserve=_bytes(plan.get("reserve_gib")),
        joules=fmean(joules) if joules else None,
        events=[(step["step"], str(step["budget_event"])) for step in steps if step.get("budget_event")],
        measured_steps=sum(bool(step.get("stages")) for step in steps),
    )


def _stages(plan: Mapping[str, Any], steps: Iterable[Record], steps_per_refill: int) -> list[StageFigures]:
    named = [stage for stage in plan.get("stages") or () if isinstance(stage, Mapping) and "name" in stage]
    planned: dict[str, Mapping[str, Any]] = {str(stage["name"]): stage for stage in named}
    measured: dict[str, list[tuple[float | None, float]]] = {}
    for name, peak, seconds in (stage for step in steps for stage in step.get("stages") or ()):
        measured.setdefault(name, []).append((peak, seconds))
    found = []
    for name in dict.fromkeys([*planned, *measured]):
        plan_of, of_steps = planned.get(name, {}), measured.get(name, [])
        peaks = [peak for peak, _ in of_steps if peak is not None]
        shared = steps_per_refill if name == SAMPLING else 1
        seconds = median(seconds for _, seconds in of_steps) / shared if of_steps else None
        memory = Measure(_bytes(plan_of.get("live_gib")), max(peaks, default=None))
        time = Measure(_number(plan_of.get("seconds")), seconds)
        found.append(StageFigures(name, memory, time, str(plan_of.get("note") or "")))
    return found


def _numbers(steps: Iterable[Record], key: str) -> list[float]:
    return [step[key] for step in steps if step.get(key) is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _bytes(gib: Any) -> float | None:
    number = _number(gib)
    return None if number is None else number * GIB
