"""Interleaved timing: the contenders of a group take turns, so that a slow moment of the machine affects all of them.

Medians of such samples give ratios that neither a drifting clock frequency nor a busy neighbor distorts.
pytest-benchmark times one callable after another; `play` therefore hands it the samples that were taken, through the
timer that every benchmark of this suite uses.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_now = 0.0


@dataclass(frozen=True)
class Pace:
    """How long a group is measured.

    Attributes:
        seconds: the least time in all.
        rounds: the least number of turns of each contender.
        turn: seconds of one turn.
        uncounted: calls at the start of a turn that are not counted, until the caches hold what this contender leaves
            there: one call is not enough for stores that bypass the cache. 0: a call is so long that it needs neither
            these nor a warm-up.
    """

    seconds: float
    rounds: int
    turn: float = 0.0
    uncounted: int = 3


PACE = {"cpu": Pace(4.0, 15, 4e-3), "cuda": Pace(0.5, 10, 4e-3)}
TOY_PACE = Pace(0.0, 2)
_MOST_CALLS = 50


@dataclass(frozen=True)
class Subject:
    """A call to time, and what happens untimed before each: the forward, when the backward is timed."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def interleave(subjects: Mapping[str, Subject], device: str, pace: Pace) -> dict[str, list[float]]:
    """Seconds a call, every subject in turn, the order reversed from round to round."""
    calls = {name: _calls_per_turn(subject, device, pace) for name, subject in subjects.items()}
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    if not order:
        return taken
    collecting = gc.isenabled()
    gc.disable()
    try:
        started, rounds = time.perf_counter(), 0
        while rounds < pace.rounds or time.perf_counter() - started < pace.seconds:
            for name in order:
                if pace.uncounted:
                    _samples(subjects[name], device, pace.uncounted)
                taken[name] += _samples(subjects[name], device, calls[name])
            order.reverse()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return taken


def spread(samples: list[float]) -> float:
    """Interquartile range over median: a few per cent on a quiet machine."""
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / statistics.median(samples)


def playback_time() -> float:
    """The timer of every benchmark here: it moves when `play` returns a sample."""
    return _now


def play(samples: list[float]) -> Callable[[], None]:
    """A callable that takes, on the clock `playback_time`, as long as the next of `samples`."""
    remaining = iter(samples)

    def advance() -> None:
        global _now
        _now += next(remaining)

    return advance


def _calls_per_turn(subject: Subject, device: str, pace: Pace) -> int:
    if not pace.uncounted:
        return 1
    _samples(subject, device, 2)  # compilation, first touch
    return max(1, min(_MOST_CALLS, round(pace.turn / max(_samples(subject, device, 1)[0], 1e-9))))


def _samples(subject: Subject, device: str, calls: int) -> list[float]:
    if device == "cuda":
        return [_pipelined(subject, calls)]
    return [_once(subject) for _ in range(calls)]


def _once(subject: Subject) -> float:
    state = subject.prepare()
    started = time.perf_counter()
    result = subject.call(state)
    seconds = time.perf_counter() - started
    del result
    return seconds


def _pipelined(subject: Subject, calls: int) -> float:
    """Calls queued one behind the other as in a training step, one wait for the device at the end."""
    states = [subject.prepare() for _ in range(calls)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for index in range(calls):
        state, states[index] = states[index], None
        subject.call(state)
        del state
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls
