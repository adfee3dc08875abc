"""Runs several jobs at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from sqdf_fast.compare.jobs import Job, Tail
from sqdf_fast.compare.progress import CompareProgress
from sqdf_fast.compare.worker import Place, context, failure, work

POLL = 0.5
# A run answers between two network calls and then writes a checkpoint.
GRACE = 60.0


@dataclass
class Active:
    """A run that is under way."""

    job: Job
    slot: int
    process: BaseProcess
    tail: Tail


class Stopped(Exception):
    """The user asked to stop; every run that was under way has saved its state."""


def run_jobs(jobs: Sequence[Job], places: Sequence[Place], progress: CompareProgress) -> dict[str, str]:
    """Run what is not finished, ``len(places)`` at a time.

    A job that fails does not end the others.

    Returns:
        of the jobs that failed, name and one line that says why.

    Raises:
        Stopped: after Ctrl-C or SIGTERM; no process of ours is left.
    """
    waiting = deque(job for job in jobs if not job.ended)
    free = deque(range(len(places)))
    active: dict[int, Active] = {}
    failed: dict[str, str] = {}
    starting = context()
    with _asked_to_stop() as asked:
        try:
            while (waiting or active) and not asked:
                while waiting and free and not asked:
                    slot = free.popleft()
                    started = _start(starting, waiting.popleft(), slot, places[slot])
                    active[slot] = started
                    progress.began(started.job, started.tail)
                wait([one.process.sentinel for one in active.values()], timeout=POLL)
                for one in [one for one in active.values() if not one.process.is_alive()]:
                    del active[one.slot]
                    free.append(one.slot)
                    one.tail.read()
                    reason = _failure(one)
                    if reason is not None:
                        failed[one.job.name] = reason
                    progress.finished(one.job, reason)
                for one in active.values():
                    one.tail.read()
                progress.tick()
            if asked:
                progress.message("Stopping: the runs under way save their state; once more to stop at once.")
                _end(list(active.values()), asked)
                raise Stopped
        finally:
            for one in active.values():
                one.process.kill()
                one.process.join()
    return failed


def _start(starting: Any, job: Job, slot: int, place: Place) -> Active:
    process = starting.Process(target=work, args=(job, place, os.getcwd()), daemon=True, name=job.name)
    process.start()
    return Active(job, slot, process, Tail(job.folder / "metrics.jsonl"))


def _failure(one: Active) -> str | None:
    if one.job.ended:
        return None
    code = one.process.exitcode
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}; out of memory, perhaps"
    return failure(one.job.log) or f"it ended without a reason; see {one.job.log}"


def _end(active: Sequence[Active], asked: list[int]) -> None:
    for one in active:
        one.process.terminate()
    deadline = time.monotonic() + GRACE
    while any(one.process.is_alive() for one in active) and time.monotonic() < deadline and len(asked) < 2:
        wait([one.process.sentinel for one in active if one.process.is_alive()], timeout=POLL)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that gets an entry for each Ctrl-C or SIGTERM."""
    asked: list[int] = []
    previous: dict[int, Any] = {}
    # Only the main thread may; elsewhere the caller has its own way to stop.
    with suppress(ValueError):
        for kind in (signal.SIGINT, signal.SIGTERM):
            previous[kind] = signal.signal(kind, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def make_places(jobs: int | None, device: str) -> list[Place]:
    """A place for each run at a time: GPUs in turn, or the CPU's cores divided.

    Args:
        jobs: at a time; None: one a GPU, one on the CPU.
        device: of the runs.
    """
    gpus = _visible_gpus() if device in ("auto", "cuda") else []
    number = jobs or max(1, len(gpus))
    # OMP_NUM_THREADS, where it is set, is the user's own decision.
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // number)
    return [Place(gpus[slot % len(gpus)] if len(gpus) > 1 else None, threads) for slot in range(number)]


def _visible_gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in named.split(",") if name] if named else [str(index) for index in range(count)]
    return names[:count]
