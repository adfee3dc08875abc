"""Progress of a run: live bars on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from sqdf_fast.display.units import format_against, format_bytes, format_duration

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN_INTERVAL = 10.0


class TimeLeft(ProgressColumn):
    """The predicted time to the end of a task."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"{format_duration(round(left))} left")


class LiveText(ProgressColumn):
    """A text that is computed whenever the bars are drawn."""

    def __init__(self, text: Callable[[], str], style: str = "") -> None:
        super().__init__()
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(), style=self._style, no_wrap=True, overflow="ellipsis")


class LiveProgress:
    """Bars on standard error, live on a terminal; ``stay`` prints them at the end anywhere. A context manager."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None, stay: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(*columns, console=self.console, refresh_per_second=4, transient=not stay)
        self._drawn = stay or self.console.is_terminal

    def __enter__(self) -> Self:
        if self._drawn:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._bars.stop()

    def message(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress(LiveProgress):
    """Step, time left, reward, KL, memory and phase of a run. A context manager.

    Args:
        total_steps: number of optimizer steps of the run.
        first_step: number of steps done before it was resumed.
        console: standard error by default; live only if it is a terminal.
        clock: seconds; replaced in tests.
        planned_bytes: peak of the plan, shown beside the memory.

    Attributes:
        memory: function that returns current and peak bytes, None if unknown; called whenever a line is drawn.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        planned_bytes: int | None = None,
    ) -> None:
        super().__init__(
            LiveText(lambda: f"{self.phase_name:<18}", style="cyan"),
            BarColumn(bar_width=24),
            LiveText(lambda: f"{self.step}/{self._expected_steps()}"),
            LiveText(lambda: " · ".join(self._facts())),
            console=console,
        )
        self.planned_bytes = planned_bytes
        self.total_steps = total_steps
        self.step = self.first_step = first_step
        self.share = first_step / total_steps
        self.phase_name = "starting"
        self.reward: float | None = None
        self.kl: float | None = None
        self.memory: Callable[[], tuple[int | None, int | None]] = lambda: (None, None)
        self._clock = clock
        self._began = clock()
        self._last_plain: float | None = None
        self._task = self._bars.add_task("", total=1)
        self._bars.update(self._task, completed=self.share)

    def __enter__(self) -> Self:
        self._began = self._clock()
        return super().__enter__()

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Show the current phase, such as "sampling", and its progress."""
        self.phase_name = f"{name} {done}/{total}" if total else name
        if self.step == self.first_step and name in ("checking", "evaluating"):
            # The time before the first step does not predict that of steps.
            self._began = self._clock()

    def update(self, step: int, reward: float, kl: float | None, share: float | None = None) -> None:
        """Optimizer step ``step``, counted from 1, is finished.

        Args:
            share: finished fraction of the run, in (0, 1]; default: that of its steps, which a limit may cut short.
        """
        self.step, self.reward, self.kl = step, reward, kl
        self.share = step / self.total_steps if share is None else min(share, 1.0)
        self._bars.update(self._task, completed=self.share)
        if not self.console.is_terminal and self._plain_line_due():
            self._last_plain = self._clock()
            self.message(" · ".join([f"step {step}/{self._expected_steps()}", *self._facts()]))

    def _plain_line_due(self) -> bool:
        last = self.share >= 1
        return last or self._last_plain is None or self._clock() - self._last_plain >= PLAIN_INTERVAL

    def _expected_steps(self) -> int:
        """The number of steps that the finished share predicts."""
        return round(self.step / self.share) if 0 < self.step < self.share * self.total_steps else self.total_steps

    def _seconds_left(self) -> float | None:
        done = self.step - self.first_step
        if done <= 0:
            return None
        # All steps take about as long as those of this process.
        to_come = self.step * (1 / self.share - 1)
        return (self._clock() - self._began) / done * to_come

    def _facts(self) -> list[str]:
        facts = []
        if self.reward is not None:
            facts.append(f"reward {self.reward:.3f}")
        if self.kl is not None:
            facts.append(f"KL {self.kl:.3g}")
        now, peak = self.memory()
        if peak is not None and self.planned_bytes:
            facts.append(f"{format_against(now, peak, self.planned_bytes)} planned")
        elif peak is not None:
            facts.append(f"memory {format_bytes(peak)}")
        left = self._seconds_left()
        if left is not None:
            facts.append(f"{format_duration(round(left))} left")
        return facts


class StageProgress(LiveProgress):
    """A bar per stage, called with (stage, done, total, figures). A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeLeft(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            stay=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, figures="")
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bars.update(self._tasks[stage], completed=done, total=total, figures=shown)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Draw the bar of stage ``name``, if its total is known."""
        if total:
            self(name, done, total, {})
