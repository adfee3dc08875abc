"""What a comparison shows while it runs: a line for each run under way and one for the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sqdf_fast.compare.jobs import Job, Tail
from sqdf_fast.display.progress import format_seconds

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN_INTERVAL = 60.0


class CompareProgress:
    """Progress of all runs. A context manager.

    Args:
        jobs: all of the comparison, finished ones too.
        console: standard error by default. Live only if it is a terminal.
        clock: seconds; replaced in tests.
    """

    def __init__(self, jobs: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.failed = jobs, 0, 0
        self.console = console or Console(stderr=True)
        self._clock, self._began, self._last_plain = clock, clock(), clock()
        self._active: dict[str, tuple[Job, Tail]] = {}
        # Shares of a run that were done in this process: they say how fast the rest goes.
        self._shares_before: dict[str, float] = {}
        self._worked = 0.0
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def known(self, jobs: Sequence[Job]) -> None:
        """These need no run: they are finished."""
        self.done += len(jobs)

    def began(self, job: Job, tail: Tail) -> None:
        """A run is under way."""
        tail.read()
        self._active[job.name] = (job, tail)
        self._shares_before[job.name] = tail.share(job.config)

    def finished(self, job: Job, failure: str | None) -> None:
        """A run is over; ``failure`` says in one line why it is not complete."""
        _, tail = self._active.pop(job.name)
        self._worked += 1 - self._shares_before[job.name]
        self.done += 1
        state = f"step {tail.step}" + ("" if tail.proxy is None else f", proxy reward {tail.proxy:.3f}")
        if failure is not None:
            self.failed += 1
            state = f"FAILED: {failure}"
        self.message(f"{job.name}: {state}  ({self._total()})")

    def tick(self) -> None:
        """Time has passed."""
        if not self.console.is_terminal and self._clock() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = self._clock()
            under_way = ", ".join(f"{job.name} {tail.share(job.config):.0%}" for job, tail in self._active.values())
            self.message(f"{self._total()}: {under_way}")

    def message(self, text: str) -> None:
        """Print a line that stays, above the live ones."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """None while nothing tells. Runs count alike, evaluations as part of them."""
        begun = sum(tail.share(job.config) for job, tail in self._active.values())
        worked = self._worked + begun - sum(self._shares_before[name] for name in self._active)
        if worked < 0.02:
            return None
        return (self._clock() - self._began) / worked * max(0.0, self.total - self.done - begun)

    def _total(self) -> str:
        left = self.seconds_left()
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done}/{self.total} runs{failed}" + ("" if left is None else f", {format_seconds(left)} left")

    def _table(self) -> Table:
        rows = Table.grid(padding=(0, 1))
        for job, tail in list(self._active.values()):
            said = f"step {tail.step}" + ("" if tail.proxy is None else f" · proxy {tail.proxy:.3f}")
            rows.add_row(
                Text(job.name, style="cyan"),
                ProgressBar(total=1, completed=tail.share(job.config), width=24),
                Text(said, no_wrap=True, overflow="ellipsis"),
            )
        overall = self.done + sum(tail.share(job.config) for job, tail in self._active.values())
        rows.add_row(Text("all"), ProgressBar(total=max(1, self.total), completed=overall, width=24), self._total())
        return rows
