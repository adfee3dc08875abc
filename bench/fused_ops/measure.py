"""Measures a row: parity of every implementation, then interleaved times, memory, and a copy of the same footprint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_ops import parity, setups, traffic
from fused_ops.cases import BASELINES, Case, Problem, implementations
from fused_ops.setups import Forward, Setup
from fused_ops.timing import PACE, TOY_PACE, Subject, interleave, peak_bytes


@dataclass(frozen=True)
class Measured:
    """Of one row, by implementation: seconds a call, peak bytes, or the fault that forbids both; `copy` in seconds."""

    samples: dict[str, list[float]]
    peaks: dict[str, int]
    faults: dict[str, str]
    copy: list[float]


@dataclass(frozen=True)
class _Ready:
    setup: Setup
    forwards: dict[str, Forward]
    faults: dict[str, str]


class Measurements:
    """Rows measured on demand, whole. The last row and the last problem are kept: their cases follow each other."""

    def __init__(self, toy: bool) -> None:
        self._toy = toy
        self._problem: Problem | None = None
        self._direction = ""

    def row(self, case: Case) -> Measured:
        """What was measured of the row that `case` belongs to."""
        if self._problem != case.problem:
            self._ready = _prepare(case.problem)
        if (self._problem, self._direction) != (case.problem, case.direction):
            self._row = self._measure(case)
        self._problem, self._direction = case.problem, case.direction
        return self._row

    def _measure(self, case: Case) -> Measured:
        ready, device = self._ready, case.problem.device
        subjects = {name: subject(ready.setup, forward, case.direction) for name, forward in ready.forwards.items()}
        half = traffic.bytes_moved(case.problem, case.direction) // 2
        if half:
            subjects["copy"] = _copy(half, device)
        samples = interleave(subjects, device, TOY_PACE if self._toy else PACE[device])
        copy = samples.pop("copy", [])
        subjects.pop("copy", None)
        peaks = {name: peak_bytes(timed, device) for name, timed in subjects.items()}
        return Measured(samples, peaks, ready.faults, copy)


def subject(setup: Setup, forward: Forward, direction: str) -> Subject:
    """The call that `direction` times."""
    if direction == "forward":
        return Subject(lambda _: forward())
    if direction == "backward":
        return Subject(setup.backward, prepare=forward)

    def both(_: object) -> object:
        outputs = forward()
        return outputs, setup.backward(outputs)

    return Subject(both)


def _prepare(problem: Problem) -> _Ready:
    """Inputs and implementations; only those inside the error budget are left to be timed."""
    setup = setups.make(problem)
    expected = parity.truth(setup)
    forwards, faults = {}, {}
    for name in implementations(problem.op, problem.device, problem.dtype):
        try:
            forward = setups.forward(setup, name)
            found = parity.fault(setup, expected, forward, own_noise=problem.noise == "drawn" and name in BASELINES)
        except Exception as error:  # whatever it is, it is this implementation's result; the others are measured
            found = f"raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if found:
            faults[name] = found
        else:
            forwards[name] = forward
    return _Ready(setup, forwards, faults)


def _copy(half: int, device: str) -> Subject:
    source = torch.randint(256, (half,), dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    return Subject(lambda _: destination.copy_(source))
