"""``report.html``: one file that shows what a run did, made from the run folder alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqdf_fast.config import dotted
from sqdf_fast.display.pages import render_page
from sqdf_fast.display.units import format_bytes, format_duration
from sqdf_fast.files import write_text
from sqdf_fast.monitor import watched
from sqdf_fast.runs.charts import evaluation_charts, monitor_charts, stage_charts, training_charts
from sqdf_fast.runs.comparison import Comparison
from sqdf_fast.runs.run import Run, Summary, cost, read_run
from sqdf_fast.runs.samples import Samples

T = TypeVar("T")

FILM_ROWS, FILM_STEPS = 6, 7
_UNKNOWN = "\N{EN DASH}"
_CONSEQUENCES = {
    "warn": "The run continued; an earlier checkpoint, if it wrote one, holds the weights before the alarm.",
    "stop": "The run ended there.",
    "restore": "The run ended there, and its result holds the weights of step {best_step}.",
}


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not, and return its path.

    Raises:
        UserError: not a run folder, damaged files in it, or the disk refuses.
    """
    path = run_folder / "report.html"
    write_text(path, render_report(read_run(run_folder)))
    return path


def render_report(run: Run) -> str:
    """The page as text. It asks the network for nothing."""
    config, comparison = run.config, run.comparison
    model, reward = (str(config.get(key) or "unnamed").rstrip("/").rsplit("/", 1)[-1] for key in ("model", "reward"))
    prompt, seed = next(iter(run.samples.prompts), ""), str(config.get("seed", 0))
    used = (config.get("evaluation") or {}).get("prompts")
    own = used is None or used == config.get("prompts")
    alarms = _alarms(run)
    remarks = [" ".join(said) for said in (_planned(comparison, run.plan), _missing(comparison, run.on_gpu)) if said]
    return render_page(
        Path(__file__).with_name("report.html"),
        title=f"{model} fine-tuned towards {reward}",
        origin=run.folder.resolve().name,
        facts=_facts(run),
        summary=Summary(run.judged),
        samples=run.samples,
        # The prompt of the first pair of images with other noise.
        sample_command=shlex.join(["sqdf-fast", "sample", str(run.folder), prompt, "--seed", seed]),
        film=_film(run.samples),
        evaluated_on="The prompts of the training" if own else f"The prompts of {used}, which training never used",
        evaluation_charts=evaluation_charts(run.evaluations),
        alarms=alarms,
        monitor_charts=[] if alarms is None else monitor_charts(run.evaluations, run.alarms),
        training_charts=training_charts(run.steps),
        cost=cost(run),
        comparison=comparison,
        remarks=remarks,
        tiles=_tiles(comparison),
        stages=_stage_table(comparison),
        stage_charts=stage_charts(comparison),
        # Settings by section, those without a section first.
        configuration={
            "run": {key: value for key, value in config.items() if not isinstance(value, Mapping)},
            **{key: dotted(value) for key, value in config.items() if isinstance(value, Mapping) and value},
        },
        environment=run.environment,
    )


def _facts(run: Run) -> list[str]:
    planned, preset = run.config.get("steps"), run.config.get("preset")
    state = f"{run.last_step} of {planned} steps" if isinstance(planned, int) else f"{run.last_step} steps"
    if run.ended is None:
        state = f"partial run: {state}"
    elif run.ended != "steps":
        state = f"{run.last_step} steps, ended by its {run.ended}"
    return [state, f"seed {run.config.get('seed', 'unknown')}", *([f"preset {preset}"] if preset else [])]


def _evenly(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(position * (len(items) - 1) / (count - 1))] for position in range(count)]


def _film(samples: Samples) -> tuple[list[str], list[tuple[str, list[Path | None]]]] | None:
    """Column heads and rows of images, a prompt per row; None for fewer than three steps."""
    steps = _evenly(list(samples.steps), FILM_STEPS)
    if len(steps) < 3:
        return None
    rows = _evenly(list(enumerate(samples.prompts)), FILM_ROWS)
    heads = [f"step {step}" for step in steps]
    return heads, [(prompt, [samples.steps[step][index] for step in steps]) for index, prompt in rows]


def _alarms(run: Run) -> list[str] | None:
    """A sentence per alarm; None if the monitor was off or had nothing to compare."""
    action = (run.config.get("monitor") or {}).get("action", "off")
    if action == "off" or len(run.evaluations) < 2 or not watched(run.evaluations):
        return None
    alarms = []
    for alarm in run.alarms:
        consequence = _CONSEQUENCES.get(action, "").format(best_step=alarm.get("best_step", "unknown"))
        reason = alarm.get("reason", "a held-out score fell")
        alarms.append(f"Alarm at step {alarm['step']}: {reason}. {consequence}".strip())
    return alarms


def _planned(found: Comparison, plan: Mapping[str, Any]) -> list[str]:
    said = []
    if found.planned:
        facts = [f"{plan['executor']} executor"] if plan.get("executor") else []
        facts += [f"micro-batch {plan['micro_batch']}"] if plan.get("micro_batch") else []
        facts += [f"{format_bytes(found.reserve)} kept in reserve"] if found.reserve else []
        said.append("Planned before the run" + (": " + ", ".join(facts) if facts else "") + ".")
        if plan.get("fits") is False:
            said.append("The plan predicted that the run would not fit.")
    if found.measured_steps:
        steps = "1 step" if found.measured_steps == 1 else f"{found.measured_steps} steps"
        said.append(f"Stages were measured in {steps}: their largest peak and their median time.")
    return said


def _missing(found: Comparison, on_gpu: bool) -> list[str]:
    said = []
    if not found.planned:
        said.append("The run has no readable plan (plan.json), so nothing is compared.")
    if not found.measured_steps:
        said.append("No step was measured stage by stage.")
    if not on_gpu and found.peak.measured is None and found.joules is None:
        return [*said, "Memory of the stages and energy are measured on a GPU only."]
    if found.peak.measured is None:
        said.append("The peak was not measured.")
    elif found.measured_steps and all(stage.memory.measured is None for stage in found.stages):
        said.append("The memory of the stages was not measured.")
    if found.joules is None:
        said.append("Energy was not measured.")
    return said


def _tiles(found: Comparison) -> list[tuple[str, str, str]]:
    """Value, name and detail of memory and time."""
    tiles = []
    for name, more, measure, show in (
        ("peak memory", "", found.peak, format_bytes),
        ("a step", ", sampling included", found.seconds, format_duration),
    ):
        planned = "" if measure.planned is None else f"planned {show(measure.planned)}"
        if measure.measured is not None:
            against = f" ({measure.difference})" if measure.difference else ""
            tiles.append((show(measure.measured), name + more, planned + against))
        elif measure.planned is not None:
            tiles.append((show(measure.planned), f"{name}, planned", ""))
    return tiles


def _stage_table(found: Comparison) -> tuple[list[str], list[list[str]]] | None:
    """Column heads and rows, the last one for the whole step, without empty columns; None without stages."""
    if not found.stages:
        return None
    rows = []
    for name, memory, seconds, note in [*found.stages, ("whole step", found.peak, found.seconds, "")]:
        cells = []
        for measure, show in ((memory, format_bytes), (seconds, format_duration)):
            cells += [_UNKNOWN if value is None else show(value) for value in measure]
            cells.append(measure.difference or _UNKNOWN)
        rows.append([name, *cells, note])
    measures = [[f"{kind} planned", f"{kind} measured", "difference"] for kind in ("memory", "time")]
    heads = ["stage", *measures[0], *measures[1], "note"]
    filled = [index for index in range(len(heads)) if any(row[index].strip(_UNKNOWN) for row in rows)]
    return [heads[index] for index in filled], [[row[index] for index in filled] for row in rows]
