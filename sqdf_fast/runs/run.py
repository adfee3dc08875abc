"""A run folder read back, and its summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sqdf_fast.display.tables import text_table
from sqdf_fast.display.units import format_bytes, format_duration
from sqdf_fast.errors import UserError
from sqdf_fast.runs.comparison import Comparison, compare, read_plan
from sqdf_fast.runs.environment import FILE as ENVIRONMENT_FILE
from sqdf_fast.runs.metrics import Record, read_metrics
from sqdf_fast.runs.samples import Samples, read_samples


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; all but the configuration may be empty.

    Attributes:
        config: nested settings.
        steps, evaluations, alarms: records of that kind, in order.
        ended: reason why the run has ended, "steps", "limit" or "monitor"; None while it has not.
        environment: versions and machine.
        plan: plan of the memory budget.
    """

    folder: Path
    config: dict[str, Any]
    steps: list[Record]
    evaluations: list[Record]
    alarms: list[Record]
    ended: str | None
    samples: Samples
    environment: dict[str, str]
    plan: Record

    @property
    def on_gpu(self) -> bool:
        """Whether the run had a GPU and was not set to the CPU."""
        return "GPU" in self.environment and self.config.get("device", "auto") != "cpu"

    @property
    def comparison(self) -> Comparison:
        """The plan beside the steps."""
        replay = self.config.get("replay")
        shared = replay.get("steps_per_refill") if isinstance(replay, dict) else None
        return compare(self.plan, self.steps, self.on_gpu, shared if isinstance(shared, int) and shared > 0 else 1)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def judged(self) -> list[Record]:
        """The evaluations up to the resulting weights, which are earlier than the last ones in a restored run."""
        monitor = self.config.get("monitor")
        restores = isinstance(monitor, dict) and monitor.get("action") == "restore"
        if self.ended != "monitor" or not restores or not self.alarms:
            return self.evaluations
        return [record for record in self.evaluations if record["step"] <= self.alarms[-1]["best_step"]]


class Summary:
    """The last evaluation against the first, which is the base model's. What was not measured is None.

    Attributes:
        proxy, true, accuracy, diversity, alignment: scores (before, after).
        proxy_gain: rise of the proxy reward in standard deviations of the base model's.
        true_gain: rise of the true reward, in its own units.
        accuracy_kept, diversity_kept: after / before.
        shuffled: alignment after training with shuffled prompts, the level of chance.
    """

    def __init__(self, evaluations: list[Record]) -> None:
        first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})

        def pair(key: str) -> tuple[float, float] | None:
            before, after = first.get(f"eval_{key}"), last.get(f"eval_{key}")
            return None if len(evaluations) < 2 or before is None or after is None else (before, after)

        def kept(scores: tuple[float, float] | None) -> float | None:
            return scores[1] / scores[0] if scores and scores[0] else None

        self.proxy, self.true, self.accuracy = pair("proxy_reward"), pair("true_reward"), pair("attribute_accuracy")
        self.diversity, self.alignment = pair("diversity"), pair("alignment")
        spread = first.get("eval_proxy_reward_std")
        self.proxy_gain = (self.proxy[1] - self.proxy[0]) / spread if self.proxy and spread else None
        self.true_gain = self.true[1] - self.true[0] if self.true else None
        self.accuracy_kept, self.diversity_kept = kept(self.accuracy), kept(self.diversity)
        self.shuffled: float | None = last.get("eval_alignment_shuffled")

    @property
    def verdict(self) -> str:
        """One sentence for the top of a report."""
        if self.proxy_gain is None:
            return "No evaluation after training yet: the curves show how far the run has come."
        if self.proxy_gain <= 0:
            change = f"{self.proxy_gain:+.2f} standard deviations of the base model's"
            return f"The trained reward did not rise ({change})."
        rise = f"The trained reward rose by {self.proxy_gain:.2f} standard deviations of the base model's"
        if self.true_gain is None:
            return f"{rise}."
        if self.true_gain <= 0:
            return f"{rise}, but the true reward fell by {-self.true_gain:.2f}: it was over-optimized."
        return f"{rise}, and the true reward, which training never saw, rose by {self.true_gain:.2f}."


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if it or its ``config.yaml`` is missing, or a file in it is damaged."""
    if not folder.is_dir():
        raise UserError(f"run folder {folder}: does not exist; give the folder that `sqdf-fast train` wrote")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a run folder (no config.yaml); give the folder that `sqdf-fast train` wrote"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder / 'config.yaml'}: cannot be read ({type(error).__name__}); restore it from a copy"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: expected a mapping of settings; restore it from a copy")
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    return Run(
        folder=folder,
        config=config,
        steps=[record for record in records if record.get("kind") == "step"],
        evaluations=[record for record in records if record.get("kind") == "evaluation"],
        alarms=[record for record in records if record.get("kind") == "alarm"],
        ended=next((str(record["reason"]) for record in records if record.get("kind") == "end"), None),
        samples=read_samples(folder),
        environment=_read_environment(folder / ENVIRONMENT_FILE),
        plan=read_plan(folder),
    )


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return {str(name): str(version) for name, version in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def summary_lines(run: Run) -> list[str]:
    """The summary as plain lines, for the end of a run on a terminal."""
    summary = Summary(run.judged)
    scores = (
        ("proxy reward", summary.proxy, "{:+.2f} base standard deviations", summary.proxy_gain),
        ("true reward", summary.true, "{:+.3f}", summary.true_gain),
        ("attribute accuracy", summary.accuracy, "{:.0%} kept", summary.accuracy_kept),
        ("diversity", summary.diversity, "{:.0%} kept", summary.diversity_kept),
        ("alignment", summary.alignment, "shuffled prompts {:.3f}", summary.shuffled),
    )
    rows: list[list[str]] = []
    for name, pair, form, figure in scores:
        if pair and (figure is not None or name == "alignment"):
            note = "" if figure is None else f"  ({form.format(figure)})"
            rows.append([name, f"{pair[0]:7.3f} -> {pair[1]:7.3f}{note}"])
    peak = run.comparison.peak
    if peak.planned is not None and peak.measured is not None:
        against = f"{format_bytes(peak.measured)} of {format_bytes(peak.planned)} planned"
        rows.append(["peak memory", f"{against}  ({peak.difference})"])
    rows.append(["cost", ", ".join(f"{value} {name}" for name, value in cost(run).items())])
    return [summary.verdict, *text_table((), rows, left=(0, 1)).splitlines()]


def cost(run: Run) -> dict[str, str]:
    """Names and formatted values of what the run spent."""
    training = sum(record.get("seconds") or 0.0 for record in run.steps)
    evaluating = sum(record.get("seconds") or 0.0 for record in run.evaluations)
    memory = [record["memory_bytes"] for record in run.steps if record.get("memory_bytes")]
    found = {
        "optimizer steps": str(len(run.steps)),
        "training time": format_duration(training),
        "evaluation time": format_duration(evaluating),
        "UNet evaluations": f"{sum(record.get('unet_evaluations') or 0 for record in run.steps):,}",
    }
    if memory:
        found["peak memory"] = format_bytes(max(memory))
    return found
