"""What a run shows while it runs: a live line on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN_INTERVAL = 10.0


class TrainingProgress:
    """Step, time left, reward, KL, memory and phase of a run. A context manager.

    Args:
        total_steps: optimizer steps of the whole run.
        first_step: steps already done, by the run that is resumed.
        console: where to write; standard error by default. Live only if it is a terminal.
        clock: seconds; replaced in tests.
        planned_bytes: the plan's peak; memory is then shown against it.

    Attributes:
        memory: bytes that are alive now and the most so far, None where not known; asked whenever a line is drawn.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        planned_bytes: int | None = None,
    ) -> None:
        self.planned_bytes = planned_bytes
        self.total_steps = total_steps
        self.step = self.first_step = first_step
        self.share = first_step / total_steps
        self.phase_name = "starting"
        self.reward: float | None = None
        self.kl: float | None = None
        self.memory: Callable[[], tuple[int | None, int | None]] = lambda: (None, None)
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._began = clock()
        self._last_plain: float | None = None
        self._live = Live(console=self.console, get_renderable=self._bar, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done: "sampling", "training", "evaluating"; and how far, where it takes long."""
        self.phase_name = f"{name} {done}/{total}" if total else name
        if self.step == self.first_step and name in ("checking", "evaluating"):
            # What precedes the first step says nothing about how long steps take.
            self._began = self._clock()

    def update(
        self,
        step: int,
        reward: float,
        kl: float | None,
        share: float | None = None,
    ) -> None:
        """An optimizer step is finished: ``step`` of ``total_steps``, counted from 1.

        Args:
            share: of the run that is over, in (0, 1]; default: that of its steps. A limit may end it earlier.
        """
        self.step, self.reward, self.kl = step, reward, kl
        self.share = step / self.total_steps if share is None else min(share, 1.0)
        if not self.console.is_terminal and self._plain_line_due():
            self._last_plain = self._clock()
            self.message(" · ".join([f"step {step}/{self._expected_steps()}", *self._facts()]))

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _plain_line_due(self) -> bool:
        last = self.share >= 1
        return last or self._last_plain is None or self._clock() - self._last_plain >= PLAIN_INTERVAL

    def _expected_steps(self) -> int:
        """Of the whole run, as far as its share so far tells."""
        return round(self.step / self.share) if 0 < self.step < self.share * self.total_steps else self.total_steps

    def _seconds_left(self) -> float | None:
        done = self.step - self.first_step
        if done <= 0:
            return None
        # Steps cost alike, so those of this process say how many are to come.
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
            facts.append(f"{format_seconds(left)} left")
        return facts

    def _bar(self) -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"{self.phase_name:<18}", style="cyan"),
            ProgressBar(total=1, completed=self.share, width=24),
            Text(f"{self.step}/{self._expected_steps()}"),
            Text(" · ".join(self._facts()), no_wrap=True, overflow="ellipsis"),
        )
        return row


def format_seconds(seconds: float) -> str:
    """``75.2`` as "1:15", ``4000`` as "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_against(now: float | None, peak: float, limit: float) -> str:
    """``2.3e9, 5.1e9, 6e9`` as "now 2.1, peak 4.7 of 5.6 GiB": all in the unit of the last, GiB or MiB."""
    size, unit = (2**30, "GiB") if limit >= 2**30 else (2**20, "MiB")
    live = "" if now is None else f"now {now / size:.1f}, "
    return f"{live}peak {peak / size:.1f} of {limit / size:.1f} {unit}"


def format_bytes(count: float) -> str:
    """``3_221_225_472`` as "3.00 GiB"; binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
