"""Interleaved timing: the implementations of a row take turns, so that a slow moment of the machine hits all.

Medians of such samples give ratios that a drifting clock frequency or a busy neighbour cannot turn. pytest-benchmark
times one callable after another; `play` therefore hands it the samples already taken, through the timer that every
benchmark of this suite is given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_now = 0.0


@dataclass(frozen=True)
class Pace:
    """How long a row is measured: `seconds` in all, but at least `rounds` turns for each; `visit` seconds a turn."""

    seconds: float
    rounds: int
    visit: float


PACE = {"cpu": Pace(4.0, 15, 4e-3), "cuda": Pace(0.5, 10, 4e-3)}
TOY_PACE = Pace(0.0, 2, 0.0)
_MOST_CALLS = 50
_UNCOUNTED_CALLS = 3
"""At the start of a turn, until the caches hold what this subject leaves in them: one call is not enough for stores
that go past the cache, which push nothing of the subject before out of it."""


@dataclass(frozen=True)
class Subject:
    """A call to be timed, and what has to happen untimed before each: the forward, when the backward is timed."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def interleave(subjects: dict[str, Subject], device: str, pace: Pace) -> dict[str, list[float]]:
    """Seconds a call, every subject in turn, the order reversed from round to round."""
    calls = {}
    for name, subject in subjects.items():
        _samples(subject, device, 2)  # compilation, first touch
        calls[name] = max(1, min(_MOST_CALLS, round(pace.visit / max(_samples(subject, device, 1)[0], 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    collecting = gc.isenabled()
    gc.disable()
    try:
        started, rounds = time.perf_counter(), 0
        while rounds < pace.rounds or time.perf_counter() - started < pace.seconds:
            for name in order:
                _samples(subjects[name], device, _UNCOUNTED_CALLS)
                taken[name] += _samples(subjects[name], device, calls[name])
            order.reverse()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return taken


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


def peak_bytes(subject: Subject, device: str) -> int:
    """The most that one call has allocated at a time beyond what it was given, by PyTorch's own account."""
    state = subject.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        subject.call(state)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        subject.call(state)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


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
