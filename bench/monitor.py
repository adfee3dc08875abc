"""When the over-optimisation monitor speaks on the embedded world, beside the true rule that it never sees.

    python bench/monitor.py                 # seeds 0, 1, 2; runs/monitor/, docs/monitor_results.md, .json and its plot
    python bench/monitor.py --only draft --steps 4 --runs runs/try --output runs/try.md

A run folder that is there and finished is read, not repeated. Runs go on after their alarm, to show what it was about.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqdf_fast.compare.table import label
from sqdf_fast.config import make_config, parse_assignments
from sqdf_fast.display.tradeoffs import Series, tradeoff_chart
from sqdf_fast.errors import UserError
from sqdf_fast.monitor import PROXY, Alarm, new_alarm, watched
from sqdf_fast.runs import read_run
from sqdf_fast.training.lifecycle import continue_run, new_run

TRUE = "eval_true_reward"
COMMON = ["checkpoint_every=0", "evaluation.images_per_prompt=2", "evaluation.grid=64"]
RUNS = {
    "sqdf": ["evaluation.every=10"],
    "draft": [
        "algorithm=draft",
        "draft.truncation=1",
        "optimizer.lr=2e-3",
        "optimizer.batch_size=8",
        "execution.micro_batch=8",
        "steps=40",
        "evaluation.every=5",
    ],
}
"""The shipped preset, and DRaFT-1, which nothing holds back."""
COLUMNS = (
    "run",
    "seed",
    "evaluated at",
    "proxy: base, end",
    "true rule: base, peak, end",
    "peak at step",
    "alarm at step",
    "judges",
    "`restore` would take step (true rule there)",
)


@dataclass(frozen=True)
class Outcome:
    """One run: its evaluations, and what the monitor says on the way."""

    name: str
    seed: int
    evaluations: list[dict[str, Any]]

    @property
    def alarms(self) -> list[Alarm]:
        counts = range(1, len(self.evaluations) + 1)
        return [alarm for count in counts if (alarm := new_alarm(self.evaluations[:count])) is not None]

    @property
    def peak(self) -> Mapping[str, Any]:
        return max(self.evaluations, key=lambda record: float(record[TRUE]))

    def true_at(self, step: int) -> float:
        return next(float(record[TRUE]) for record in self.evaluations if record["step"] == step)


def outcome(name: str, seed: int, folder: Path, assignments: Sequence[str]) -> Outcome:
    """Train into ``folder``, or go on where it stopped, and read it."""
    if (folder / "config.yaml").exists():
        if not read_run(folder).finished:
            continue_run(folder)
    else:
        settings = parse_assignments([*COMMON, *RUNS[name], *assignments])
        new_run(make_config("shapes", assignments=settings, flags={"seed": seed}), folder)
    found = read_run(folder).evaluations
    keys = [*watched(found), PROXY, TRUE]
    wanted = ["step", "eval_kl", *(f"{key}{end}" for key in keys for end in ("", "_low", "_high"))]
    return Outcome(name, seed, [{key: record[key] for key in wanted if key in record} for record in found])


def row(run: Outcome) -> list[str]:
    """The cells of one run."""
    first, last, peak = run.evaluations[0], run.evaluations[-1], run.peak
    alarm = run.alarms[0] if run.alarms else None
    return [
        run.name,
        str(run.seed),
        f"0, {run.evaluations[1]['step']}, ..., {last['step']}",
        f"{first[PROXY]:.2f}, {last[PROXY]:.2f}",
        f"{first[TRUE]:.2f}, {peak[TRUE]:.2f}, {last[TRUE]:.2f}",
        str(peak["step"]),
        "none" if alarm is None else str(alarm.step),
        "" if alarm is None else ", ".join(turn.name for turn in alarm.turns),
        "" if alarm is None else f"{alarm.best_step} ({run.true_at(alarm.best_step):.2f})",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def curve(run: Outcome) -> list[str]:
    """Lines of Markdown: every evaluation of a run; a star where the monitor speaks."""
    keys = [PROXY, TRUE, *watched(run.evaluations)]
    spoken = {alarm.step for alarm in run.alarms}
    rows = [
        [
            f"{record['step']}{'*' if record['step'] in spoken else ''}",
            *(f"{record[key]:.3f}" for key in keys),
            f"{record['eval_kl']:.4f}",
        ]
        for record in run.evaluations
    ]
    names = [label(key.removeprefix("eval_")) for key in keys]
    return ["", f"## {run.name}, seed {run.seed}", "", *table(["step", *names, "KL"], rows)]


def plotted(run: Outcome, position: int) -> Series:
    """The true rule by step; the name says when the monitor spoke."""
    said = f"alarm at {run.alarms[0].step}" if run.alarms else "no alarm"
    points = [(float(record["step"]), float(record[TRUE])) for record in run.evaluations]
    return Series.of(f"{run.name}-{run.seed}, {said}", points, position)


def page(runs: Sequence[Outcome], picture: str) -> str:
    """The Markdown page; `picture`: the plot's address."""
    lines = [
        "# The over-optimisation monitor on the embedded world",
        "",
        "`python bench/monitor.py` trains these runs and writes this page and monitor_results.json; monitor.md says",
        "what the monitor does. Every evaluation is of 64 pictures of 32 held-out prompts, the same noise each time.",
        "The true rule is what neither training nor monitor sees. `sqdf` is the shipped preset, `draft` is DRaFT-1,",
        "which nothing holds back; the settings beside the preset's:",
        "",
        *(f"- `{name}`: `{' '.join(RUNS[name]).replace('evaluation.', '')}`" for name in RUNS),
        "",
        *table(COLUMNS, [row(run) for run in runs]),
        "",
        f"![The true rule by step]({picture})",
        *(line for run in runs for line in curve(run)),
        "",
        "A star marks the alarm.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, help="fewer optimizer steps, for a try")
    parser.add_argument("--runs", type=Path, default=Path("runs/monitor"))
    parser.add_argument("--output", type=Path, default=Path("docs/monitor_results.md"))
    given = parser.parse_args(arguments)
    fewer = [f"steps={given.steps}"] if given.steps else []
    try:
        runs = [
            outcome(name, seed, given.runs / f"{name}-{seed}", fewer) for name in given.only for seed in given.seeds
        ]
    except UserError as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 2
    images = given.output.parent / "images"
    series = [plotted(run, position) for position, run in enumerate(runs)]
    title = "The true rule, which neither training nor monitor sees"
    chart = tradeoff_chart(title, "optimizer step", "true rule", series, better=(0, 1))
    chart.save(images / f"{given.output.stem}.png")
    given.output.write_text(page(runs, f"images/{given.output.stem}.png"), encoding="utf-8")
    curves = [
        f' {{"run": "{run.name}", "seed": {run.seed}, "evaluations": [\n  '
        + ",\n  ".join(map(json.dumps, run.evaluations))
        + "]}"
        for run in runs
    ]
    given.output.with_suffix(".json").write_text("[\n" + ",\n".join(curves) + "\n]\n", encoding="utf-8")
    print(given.output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
