"""Progress of a comparison, of runs that are made up."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from sqdf_fast.compare.progress import CompareProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Tail:
    """As much of a run as ``done`` says."""

    step, proxy, done = 0, None, 0.0

    def read(self) -> None:
        pass

    def share(self, config) -> float:
        return self.done


def run(terminal: bool) -> str:
    """Two runs, one finished before, one that fails after half of it is done here."""
    clock, output, tail = Clock(), io.StringIO(), Tail()
    job = SimpleNamespace(name="sqdf seed [1]", config=None)
    console = Console(file=output, force_terminal=terminal, width=120)
    with CompareProgress(3, console=console, clock=clock) as progress:
        progress.known([job])
        tail.done = 0.5
        progress.began(job, tail)
        assert progress.seconds_left() is None
        clock.now, tail.step, tail.done = 70.0, 4, 0.75
        progress.tick()
        assert progress.seconds_left() == 70.0 / 0.25 * 1.25
        tail.proxy = 0.5
        progress.tick()
        progress._bars.refresh()
        progress.finished(job, "no <light>" if terminal else None)
        assert (progress.done, progress.failed) == (2, int(terminal))
        progress.tick()
    return output.getvalue()


def test_without_a_terminal_a_line_a_minute_and_one_a_run():
    assert run(terminal=False).splitlines() == [
        "1/3 runs, 5 min 50 s left: sqdf seed [1] 75%",
        "sqdf seed [1]: step 4, proxy reward 0.500  (2/3 runs, 2 min 20 s left)",
    ]


def test_on_a_terminal_a_bar_a_run_and_one_for_all():
    shown = run(terminal=True)
    for text in ("all", "1/3 runs, 5 min 50 s left", "sqdf seed [1]", "step 4 · proxy 0.500"):
        assert text in shown
    assert "sqdf seed [1]: FAILED: no <light>  (2/3 runs, 1 failed, 2 min 20 s left)" in shown
