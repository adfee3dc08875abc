"""A run folder, read back, and what it shows in a few numbers."""

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
    """What a run folder holds; any part but the configuration may still be empty.

    Attributes:
        config: the nested settings.
        steps: records of kind "step", in order.
        evaluations: records of kind "evaluation", in order; alarms: of kind "alarm", what the monitor said.
        ended: why the run is over: "steps", "limit" or "monitor"; None while it is not.
        environment: versions; empty if the run kept none.
        plan: what the planner wrote before the run; empty without one.
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
        """Whether the run was on a GPU: one was there, and the CPU was not asked for."""
        return "GPU" in self.environment and self.config.get("device", "auto") != "cpu"

    @property
    def comparison(self) -> Comparison:
        """Its plan beside its steps."""
        replay = self.config.get("replay")
        shared = replay.get("steps_per_refill") if isinstance(replay, dict) else None
        return compare(self.plan, self.steps, self.on_gpu, shared if isinstance(shared, int) and shared > 0 else 1)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def judged(self) -> list[Record]:
        """The evaluations up to the weights that the run left: a restored run left earlier ones than its last."""
        monitor = self.config.get("monitor")
        restores = isinstance(monitor, dict) and monitor.get("action") == "restore"
        if self.ended != "monitor" or not restores or not self.alarms:
            return self.evaluations
        return [record for record in self.evaluations if record["step"] <= self.alarms[-1]["best_step"]]

    @property
    def finished(self) -> bool:
        return self.ended is not None


@dataclass(frozen=True)
class Summary:
    """The last evaluation against the first, which is the base model's. None where nothing can be said.

    Attributes:
        proxy, true, accuracy, diversity, alignment: (before, after).
        proxy_gain: in standard deviations of the base model's proxy reward.
        true_gain: in the true reward's units.
        accuracy_kept, diversity_kept: after / before.
        shuffled: alignment after training with the prompts shuffled, the level of chance.
    """

    proxy: tuple[float, float] | None
    true: tuple[float, float] | None
    accuracy: tuple[float, float] | None
    diversity: tuple[float, float] | None
    alignment: tuple[float, float] | None
    proxy_gain: float | None
    true_gain: float | None
    accuracy_kept: float | None
    diversity_kept: float | None
    shuffled: float | None

    @property
    def verdict(self) -> str:
        """One sentence for the top of a report."""
        if self.proxy_gain is None:
            return "No evaluation after training yet: the curves show how far the run has come."
        rise = f"The trained reward rose by {self.proxy_gain:.2f} standard deviations of the base model's"
        if self.proxy_gain <= 0:
            change = f"{self.proxy_gain:+.2f} standard deviations of the base model's"
            return f"The trained reward did not rise ({change})."
        if self.true_gain is None:
            return f"{rise}."
        if self.true_gain <= 0:
            return f"{rise}, but the true reward fell by {-self.true_gain:.2f}: it was over-optimized."
        return f"{rise}, and the true reward, which training never saw, rose by {self.true_gain:.2f}."


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: no such folder, no ``config.yaml`` in it, or a file in it that is damaged.
    """
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


def summarise(evaluations: list[Record]) -> Summary:
    """Compare the last evaluation with the first."""
    proxy = _before_after(evaluations, "eval_proxy_reward")
    true = _before_after(evaluations, "eval_true_reward")
    accuracy = _before_after(evaluations, "eval_attribute_accuracy")
    diversity = _before_after(evaluations, "eval_diversity")
    spread = evaluations[0].get("eval_proxy_reward_std") if evaluations else None
    return Summary(
        proxy=proxy,
        true=true,
        accuracy=accuracy,
        diversity=diversity,
        alignment=_before_after(evaluations, "eval_alignment"),
        proxy_gain=(proxy[1] - proxy[0]) / spread if proxy and spread else None,
        true_gain=true[1] - true[0] if true else None,
        accuracy_kept=accuracy[1] / accuracy[0] if accuracy and accuracy[0] else None,
        diversity_kept=diversity[1] / diversity[0] if diversity and diversity[0] else None,
        shuffled=evaluations[-1].get("eval_alignment_shuffled") if evaluations else None,
    )


def _before_after(evaluations: list[Record], key: str) -> tuple[float, float] | None:
    if len(evaluations) < 2:
        return None
    before, after = evaluations[0].get(key), evaluations[-1].get(key)
    return None if before is None or after is None else (before, after)


def summary_lines(run: Run) -> list[str]:
    """The summary as plain lines, for the end of a run on a terminal."""
    summary = summarise(run.judged)
    rows: list[list[str]] = []
    if summary.proxy and summary.proxy_gain is not None:
        rows.append(["proxy reward", _change(summary.proxy, f"{summary.proxy_gain:+.2f} base standard deviations")])
    if summary.true and summary.true_gain is not None:
        rows.append(["true reward", _change(summary.true, f"{summary.true_gain:+.3f}")])
    if summary.accuracy and summary.accuracy_kept is not None:
        rows.append(["attribute accuracy", _change(summary.accuracy, f"{summary.accuracy_kept:.0%} kept")])
    if summary.diversity and summary.diversity_kept is not None:
        rows.append(["diversity", _change(summary.diversity, f"{summary.diversity_kept:.0%} kept")])
    if summary.alignment:
        chance = "" if summary.shuffled is None else f"shuffled prompts {summary.shuffled:.3f}"
        rows.append(["alignment", _change(summary.alignment, chance)])
    peak = run.comparison.peak
    if peak.planned is not None and peak.measured is not None:
        pair = f"{format_bytes(peak.measured)} of {format_bytes(peak.planned)} planned"
        rows.append(["peak memory", f"{pair}  ({peak.difference})"])
    rows.append(["cost", ", ".join(f"{value} {name}" for name, value in cost(run).items())])
    return [summary.verdict, *text_table((), rows, left=(0, 1)).splitlines()]


def cost(run: Run) -> dict[str, str]:
    """What the run took, ready to print: name and value."""
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


def _change(pair: tuple[float, float], note: str) -> str:
    return f"{pair[0]:7.3f} -> {pair[1]:7.3f}" + (f"  ({note})" if note else "")
