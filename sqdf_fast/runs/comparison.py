"""A run's plan beside its measurements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from sqdf_fast.runs.metrics import Record

FILE = "plan.json"
SAMPLING = "sampling"
GIB = 2**30


class Measure(NamedTuple):
    """A planned figure beside the measured one; None where unknown."""

    planned: float | None = None
    measured: float | None = None

    @property
    def difference(self) -> str:
        """Relative deviation of the measured figure, "+3.1%"; empty if one of them is missing."""
        if not self.planned or self.measured is None:
            return ""
        return f"{self.measured / self.planned - 1:+.1%}"


class StageFigures(NamedTuple):
    """One stage of a step.

    Attributes:
        memory: bytes; largest measured peak.
        seconds: median, so that the warm-up in the first step does not count; of sampling, a step's share.
        note: trade-off that the plan made in this stage.
    """

    name: str
    memory: Measure = Measure()
    seconds: Measure = Measure()
    note: str = ""


class Comparison(NamedTuple):
    """A plan beside the records of the steps.

    Attributes:
        planned: whether a readable plan exists.
        stages: stages in the plan's order, then those that it does not know.
        peak: bytes of a GPU's allocator, or of live tensors on a CPU.
        seconds: time per step; measured is the mean over all steps, including sampling.
        reserve: bytes that the plan leaves free above its peak.
        joules: mean energy of the measured steps.
        events: steps and descriptions of out-of-memory fallbacks.
        measured_steps: number of steps whose stages were measured.
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
    """``plan.json`` of a run folder; empty if it is missing or cannot be read."""
    try:
        plan = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def compare(plan: Mapping[str, Any], steps: Iterable[Record], on_gpu: bool, steps_per_refill: int = 1) -> Comparison:
    """Compare ``plan`` with the records of kind "step".

    Args:
        on_gpu: whether ``memory_bytes`` is a GPU allocator's peak; on a CPU it is the resident memory of the process,
            which no plan predicts.
        steps_per_refill: number of steps per sampling, which the plan has already taken into account.
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
    measured: dict[str, list[tuple[float | None, float]]] = {name: [] for name in planned}
    for name, peak, seconds in (stage for step in steps for stage in step.get("stages") or ()):
        measured.setdefault(name, []).append((peak, seconds))
    found = []
    for name, pairs in measured.items():
        plan_of = planned.get(name, {})
        shared = steps_per_refill if name == SAMPLING else 1
        seconds = median(seconds for _, seconds in pairs) / shared if pairs else None
        peak = max((peak for peak, _ in pairs if peak is not None), default=None)
        memory, time = Measure(_bytes(plan_of.get("live_gib")), peak), Measure(_number(plan_of.get("seconds")), seconds)
        found.append(StageFigures(name, memory, time, str(plan_of.get("note") or "")))
    return found


def _numbers(steps: Iterable[Record], key: str) -> list[float]:
    return [step[key] for step in steps if step.get(key) is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _bytes(gib: Any) -> float | None:
    number = _number(gib)
    return None if number is None else number * GIB
