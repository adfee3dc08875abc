"""Progress of a comparison: a bar for each running job and one for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn

from sqdf_fast.compare.jobs import Job, Tail
from sqdf_fast.display import format_duration
from sqdf_fast.display.progress import LiveProgress

PLAIN_INTERVAL = 60.0


class _Active(NamedTuple):
    """A run in progress and its bar; ``before`` is the share that an earlier process did."""

    job: Job
    tail: Tail
    before: float
    bar: TaskID

    @property
    def share(self) -> float:
        return self.tail.share(self.job.config)


class CompareProgress(LiveProgress):
    """Progress of all runs, live on a terminal. A context manager.

    Args:
        jobs: number of all runs, including finished ones.
        console: standard error by default.
        clock: seconds; replaced in tests.
    """

    def __init__(self, jobs: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
        )
        self.total, self.done, self.failed = jobs, 0, 0
        self._clock, self._began, self._last_plain = clock, clock(), clock()
        self._active: dict[str, _Active] = {}
        # Number of runs done in this process, which predicts the time left.
        self._worked = 0.0
        self._whole = self._bars.add_task("all", total=jobs, state="")

    def known(self, jobs: Sequence[Job]) -> None:
        """These runs were finished before."""
        self.done += len(jobs)

    def began(self, job: Job, tail: Tail) -> None:
        """A run has started."""
        tail.read()
        bar = self._bars.add_task(job.name, total=1, state="")
        self._active[job.name] = _Active(job, tail, tail.share(job.config), bar)

    def finished(self, job: Job, failure: str | None) -> None:
        """A run has ended; ``failure`` is its one-line reason, if it failed."""
        active = self._active.pop(job.name)
        self._bars.remove_task(active.bar)
        self._worked += 1 - active.before
        self.done += 1
        state = _state(active.tail, ", proxy reward")
        if failure is not None:
            self.failed += 1
            state = f"FAILED: {failure}"
        self.message(f"{job.name}: {state}  ({self._summary()})")

    def tick(self) -> None:
        """Redraw; without a terminal, print a line a minute."""
        for one in self._active.values():
            self._bars.update(one.bar, completed=one.share, state=_state(one.tail, " · proxy"))
        done = self.done + sum(one.share for one in self._active.values())
        self._bars.update(self._whole, total=self.total, completed=done, state=self._summary())
        if not self.console.is_terminal and self._clock() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = self._clock()
            under_way = ", ".join(f"{one.job.name} {one.share:.0%}" for one in self._active.values())
            self.message(f"{self._summary()}: {under_way}")

    def seconds_left(self) -> float | None:
        """Estimate from equally weighted runs; None while there is nothing to predict from."""
        begun = sum(one.share for one in self._active.values())
        worked = self._worked + sum(one.share - one.before for one in self._active.values())
        if worked < 0.02:
            return None
        return (self._clock() - self._began) / worked * max(0.0, self.total - self.done - begun)

    def _summary(self) -> str:
        left = self.seconds_left()
        failed = f", {self.failed} failed" if self.failed else ""
        coming = "" if left is None else f", {format_duration(round(left))} left"
        return f"{self.done}/{self.total} runs{failed}{coming}"


def _state(tail: Tail, proxy: str) -> str:
    return f"step {tail.step}" + ("" if tail.proxy is None else f"{proxy} {tail.proxy:.3f}")
