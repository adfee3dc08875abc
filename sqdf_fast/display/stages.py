"""Progress of a job in stages: one bar a stage, with time left and the stage's figures."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StageProgress:
    """Called with (stage, done, total, figures); draws on standard error. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console or Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, figures="")
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bars.update(self._tasks[stage], completed=done, total=total, figures=shown)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Draw the bar of stage ``name``; one without a total has nothing to show yet."""
        if total:
            self(name, done, total, {})

    def message(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
