"""When the over-optimization monitor raises an alarm on the embedded model, beside the true rule that it never sees.

    python bench monitor                              # seeds 0 1 2; docs/monitor_results.md, its plot and its figures
    python bench monitor --recorded                   # the page again, from bench/study/monitor_results.json
    python bench monitor --only draft --steps 4 --runs runs/try --output runs/try

A finished run is read from its folder, not repeated. Runs continue after their alarm, to show its cause.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.tables import Section, markdown, of_rows

from sqdf_fast.compare.table import label
from sqdf_fast.display.plots import Line, line_chart
from sqdf_fast.monitor import PROXY, Alarm, new_alarm, watched
from study.seeds import DOCS, parser, trained

FIGURES = Path(__file__).with_name("monitor_results.json")
IMAGE = "images/monitor_results.png"
TRUE = "eval_true_reward"
COMMON = ["checkpoint_every=0", "evaluation.images_per_prompt=2", "evaluation.grid=64"]
_DRAFT = "algorithm=draft draft.truncation=1 optimizer.lr=2e-3 optimizer.batch_size=8 execution.micro_batch=8"
RUNS = {"sqdf": ["evaluation.every=10"], "draft": [*_DRAFT.split(), "steps=40", "evaluation.every=5"]}
"""The shipped preset, and DRaFT-1, which nothing holds back."""


@dataclass(frozen=True)
class Outcome:
    """One run: its evaluations, and the monitor's alarms."""

    run: str
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
    """Train into ``folder``, or continue where it stopped, and read it."""
    found = trained(folder, seed, [*COMMON, *RUNS[name], *assignments]).evaluations
    keys = [*watched(found), PROXY, TRUE]
    wanted = ["step", "eval_kl", *(f"{key}{end}" for key in keys for end in ("", "_low", "_high"))]
    return Outcome(name, seed, [{key: record[key] for key in wanted if key in record} for record in found])


def row(run: Outcome) -> dict[str, str]:
    """The cells of one run, by the heads of their columns."""
    first, last, peak = run.evaluations[0], run.evaluations[-1], run.peak
    alarm = run.alarms[0] if run.alarms else None
    return {
        "run": run.run,
        "seed": str(run.seed),
        "evaluated at": f"0, {run.evaluations[1]['step']}, ..., {last['step']}",
        "proxy: base, end": f"{first[PROXY]:.2f}, {last[PROXY]:.2f}",
        "true rule: base, peak, end": f"{first[TRUE]:.2f}, {peak[TRUE]:.2f}, {last[TRUE]:.2f}",
        "peak at step": str(peak["step"]),
        "alarm at step": str(alarm.step) if alarm else "none",
        "judges": ", ".join(turn.name for turn in alarm.turns) if alarm else "",
        "`restore` would take step (true rule there)": (
            f"{alarm.best_step} ({run.true_at(alarm.best_step):.2f})" if alarm else ""
        ),
    }


def curve(run: Outcome) -> Section:
    """Every evaluation of a run; a star where the monitor raises an alarm."""
    keys = [PROXY, TRUE, *watched(run.evaluations)]
    alarms = {alarm.step for alarm in run.alarms}
    rows = [
        {"step": f"{record['step']}{'*' * (record['step'] in alarms)}"}
        | {label(key.removeprefix("eval_")): f"{record[key]:.3f}" for key in keys}
        | {"KL": f"{record['eval_kl']:.4f}"}
        for record in run.evaluations
    ]
    return Section(f"## {run.run}, seed {run.seed}", tables=[of_rows(rows)])


def page(runs: Sequence[Outcome]) -> list[Section]:
    intro = [
        "`python bench monitor` trains these runs and writes this page and bench/study/monitor_results.json;",
        "[monitor.md](monitor.md) says what the monitor does. Every evaluation is of 64 images of 32 held-out prompts,",
        "the same noise each time. Neither training nor the monitor sees the true rule. `sqdf` is the shipped preset,",
        "`draft` is DRaFT-1, which nothing holds back; the settings beside the preset's:",
    ]
    settings = [f"`{name}`: `{' '.join(RUNS[name]).replace('evaluation.', '')}`" for name in RUNS]
    return [
        Section("# The over-optimization monitor on the embedded model", ["\n".join(intro)], settings),
        Section(tables=[of_rows(map(row, runs))]),
        Section(images=[IMAGE]),
        *map(curve, runs),
        Section(text=["A star marks the alarm."]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("monitor", __doc__, "runs/monitor")
    options.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options.add_argument("--recorded", action="store_true", help="read the recorded figures instead of runs")
    given = options.parse_args(arguments)
    if given.recorded:
        runs = [Outcome(**found) for found in json.loads(FIGURES.read_text(encoding="utf-8"))]
    else:
        fewer = [f"steps={given.steps}"] if given.steps else []
        runs = [
            outcome(name, seed, given.runs / f"{name}-{seed}", fewer) for name in given.only for seed in given.seeds
        ]
    docs = given.output or DOCS
    lines = [
        Line(
            f"{run.run}-{run.seed}, {f'alarm at {run.alarms[0].step}' if run.alarms else 'no alarm'}",
            [(float(record["step"]), float(record[TRUE])) for record in run.evaluations],
            number,
        )
        for number, run in enumerate(runs, start=1)
    ]
    title = "The true rule, which neither training nor the monitor sees"
    if chart := line_chart(title, lines, "optimizer step", "true rule"):
        chart.figure.set_size_inches(9, 5.5)
        chart.save(docs / IMAGE)
    text = markdown(page(runs))
    (docs / "monitor_results.md").write_text(text, encoding="utf-8")
    if not given.recorded:
        figures = given.output / FIGURES.name if given.output else FIGURES
        recorded = ",\n".join(json.dumps(asdict(run)) for run in runs)
        figures.write_text(f"[\n{recorded}\n]\n", encoding="utf-8")
    print(text)
