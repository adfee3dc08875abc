from __future__ import annotations

import io

import pytest
from rich.console import Console

from sqdf_fast.display import StageProgress, TrainingProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(terminal: bool, steps: int = 12, first: int = 0, seconds: float = 4.0) -> str:
    clock, output = Clock(), io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160)
    with TrainingProgress(steps, first, console=console, clock=clock) as progress:
        progress.memory = lambda: (2**30, 3 * 2**30)
        for step in range(first + 1, steps + 1):
            progress.phase("sampling", 3, 20)
            progress.phase("training")
            clock.now += seconds
            progress.update(step, reward=step / 10, kl=0.0123)
        progress.message("evaluation: [bold] 1.5")
    return output.getvalue()


def test_without_a_terminal_a_plain_line_now_and_then():
    lines = run(terminal=False).splitlines()
    assert lines == [
        "step 1/12 · reward 0.100 · KL 0.0123 · memory 3.00 GiB · 44 s left",
        "step 4/12 · reward 0.400 · KL 0.0123 · memory 3.00 GiB · 32 s left",
        "step 7/12 · reward 0.700 · KL 0.0123 · memory 3.00 GiB · 20 s left",
        "step 10/12 · reward 1.000 · KL 0.0123 · memory 3.00 GiB · 8 s left",
        "step 12/12 · reward 1.200 · KL 0.0123 · memory 3.00 GiB · 0 s left",
        "evaluation: [bold] 1.5",
    ]


def test_resumed_run_counts_only_its_own_steps():
    assert run(terminal=False, first=10).splitlines()[0].endswith("· 4 s left")


def test_on_a_terminal_a_live_line_with_every_fact():
    shown = run(terminal=True)
    assert "evaluation: [bold] 1.5" in shown
    for fact in ("training", "12/12", "reward 1.200", "KL 0.0123", "memory 3.00 GiB", "left"):
        assert fact in shown


def test_facts_before_the_first_step():
    output = io.StringIO()
    with TrainingProgress(5, console=Console(file=output, force_terminal=True, width=120), clock=Clock()) as progress:
        progress.phase("evaluating", 2, 40)
    assert "evaluating 2/40" in output.getvalue()
    assert "0/5" in output.getvalue()


def test_time_left_does_not_count_what_precedes_the_first_step():
    clock, output = Clock(), io.StringIO()
    with TrainingProgress(3, console=Console(file=output, width=120), clock=clock) as progress:
        clock.now += 500
        progress.phase("evaluating", 5, 5)
        clock.now += 4
        progress.update(1, 0.1, 0.01)
    assert output.getvalue().strip().endswith("8 s left")


@pytest.mark.parametrize(
    ("planned", "memory", "fact"),
    [
        (56 * 2**30 // 10, (42 * 2**30 // 10, 51 * 2**30 // 10), "now 4.2, peak 5.1 of 5.6 GiB planned"),
        (60 * 2**20, (None, 512 * 2**17), "peak 64.0 of 60.0 MiB planned"),
        (None, (2**30, 3 * 2**30), "memory 3.00 GiB"),
    ],
)
def test_memory_is_shown_against_the_plan(planned, memory, fact):
    output = io.StringIO()
    with TrainingProgress(2, console=Console(file=output, width=120), clock=Clock(), planned_bytes=planned) as progress:
        progress.memory = lambda: memory
        progress.update(1, 0.1, 0.01)
    assert output.getvalue().strip() == " · ".join(["step 1/2", "reward 0.100", "KL 0.01", fact, "0 s left"])


def test_a_first_step_that_takes_long_shows_memory_as_it_is_at_every_moment():
    output, held = io.StringIO(), iter(range(1, 10**6))
    console = Console(file=output, force_terminal=True, width=120)
    with TrainingProgress(2, console=console, clock=Clock(), planned_bytes=9 * 2**30) as progress:
        progress.memory = lambda: (next(held) * 2**30, 9 * 2**30)
        progress.phase("training")
        for _ in range(3):
            progress._bars.refresh()
    shown = output.getvalue()
    assert progress.step == 0
    for now in (1, 2, 3):
        assert f"now {now}.0, peak 9.0 of 9.0 GiB planned" in shown


def test_each_stage_has_its_bar_and_figures():
    out = io.StringIO()
    with StageProgress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress("sampling", 3, 3, {})
        progress("training", 1, 4, {"loss": 0.5})
        progress("training", 2, 4, {"loss": 0.25})
    last = out.getvalue().split("sampling")[-1]
    assert "3/3" in last
    assert "2/4" in last
    assert "loss 0.25" in last
