"""``results.json``: what a comparison found, as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqdf_fast import __version__
from sqdf_fast.compare.curves import (
    COSTS,
    PROXY,
    Array,
    Curve,
    CurvePosition,
    Draws,
    Estimate,
    Level,
    best_of_all,
    common_level,
    cost_at,
    crossing,
    difference,
    estimate,
    score_at,
)
from sqdf_fast.compare.protocol import Protocol
from sqdf_fast.compare.tuning import Choice
from sqdf_fast.files import write_text

# In this order; what a run does not measure is left out, what is not here comes after it.
KNOWN = (
    PROXY,
    "true_reward",
    "alignment",
    "attribute_accuracy",
    "diversity",
    "vendi",
    "vendi_all",
    "distance_to_base",
    "kl",
)
HIDDEN = ("alignment_shuffled",)


@dataclass(frozen=True)
class Runs:
    """The runs of one method.

    Attributes:
        label: name within its group, for people.
        group: axis of an ablation; "" for the methods.
        curves, folders: of the finished runs, one per seed.
        unfinished: one-line reason by seed.
        training_free: nothing is trained; costs are those of one image, each time one is sampled.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    curves: list[Curve]
    folders: list[Path]
    unfinished: dict[int, str]
    training_free: bool = False


@dataclass(frozen=True)
class MethodSummary:
    """A method at one position of each of its curves.

    Attributes:
        scores: means over seeds, with intervals.
        costs: means over seeds; of peak_bytes the maximum.
        reached: number of seeds whose curve reaches that position.
        seeds: number of all seeds.
        untrained: whether the position is every curve's first evaluation, before training.
    """

    scores: dict[str, Estimate]
    costs: dict[str, float]
    reached: int
    seeds: int
    untrained: bool

    @property
    def complete(self) -> bool:
        """Whether every seed reached the position."""
        return 0 < self.reached == self.seeds


@dataclass(frozen=True)
class PairwiseComparison:
    """Two methods at the best proxy reward of the weaker one.

    Attributes:
        group: group of both, as ``Runs.group``.
        one, other: labels.
        level: proxy reward at which they are compared.
        differences: of ``one`` less ``other``, by score.
        costs: cost of ``one`` over that of ``other``, up to the level.
        untrained: labels of the methods that are at the level before training.
    """

    group: str
    one: str
    other: str
    level: float
    differences: dict[str, Estimate]
    costs: dict[str, float]
    untrained: list[str]


@dataclass(frozen=True)
class Results:
    """Everything a report is made of.

    Attributes:
        runs: methods and variants, in the protocol's order.
        metrics: names of the scores, in the order to show.
        levels: levels of equal reward by group, "" for the methods.
        end, equal: summaries by index of ``runs``: at the end of training, and at the level of its group.
        positions: where the curves of ``runs`` reach the level of their group.
        comparisons: the ablated method (default: the first one) against every other and against its variants.
    """

    protocol: Protocol
    runs: list[Runs]
    metrics: list[str]
    levels: dict[str, Level | None]
    end: list[MethodSummary]
    equal: list[MethodSummary]
    positions: list[list[CurvePosition | None]]
    comparisons: list[PairwiseComparison]
    choices: dict[str, Choice]
    environment: dict[str, str]

    def comparisons_of(self, group: str) -> list[PairwiseComparison]:
        """Comparisons whose other side belongs to a group."""
        return [comparison for comparison in self.comparisons if comparison.group == group]

    @property
    def groups(self) -> list[str]:
        """ "" for the methods, then each axis."""
        return list(dict.fromkeys(run.group for run in self.runs))

    def of(self, group: str) -> list[int]:
        """Positions of a group's runs."""
        return [index for index, run in enumerate(self.runs) if run.group == group]


def make_results(
    protocol: Protocol, runs: Sequence[Runs], choices: Mapping[str, Choice], environment: Mapping[str, str]
) -> Results:
    """Summaries at the end and at equal reward, with bootstrap intervals over seeds and prompts."""
    draws = Draws()
    metrics = _metrics(runs)
    groups = list(dict.fromkeys(run.group for run in runs))
    levels = {
        group: common_level({run.label: run.curves for run in runs if run.group == group and not run.training_free})
        for group in groups
    }
    positions = [[_at(curve, levels[run.group]) for curve in run.curves] for run in runs]
    methods = [run for run in runs if not run.group and run.curves]
    first = next((run for run in methods if run.name == protocol.ablated), methods[0] if methods else None)
    return Results(
        protocol=protocol,
        runs=list(runs),
        metrics=metrics,
        levels=levels,
        end=[_summarise(run, [curve.last for curve in run.curves], metrics, draws) for run in runs],
        equal=[_summarise(run, found, metrics, draws) for run, found in zip(runs, positions, strict=True)],
        positions=positions,
        comparisons=[
            _compare(first, run, metrics, draws) for run in runs if first and run.curves and run.name != first.name
        ],
        choices=dict(choices),
        environment=dict(environment),
    )


def _metrics(runs: Sequence[Runs]) -> list[str]:
    found = dict.fromkeys(
        name for run in runs for curve in run.curves for point in curve.points for name in point.scores
    )
    held_out = [name for name in found if name not in KNOWN and name not in HIDDEN]
    before, after = KNOWN[:2], KNOWN[2:]
    return [name for name in (*before, *held_out, *after) if name in found]


def _at(curve: Curve, level: Level | None) -> CurvePosition | None:
    return None if level is None else crossing(curve, level.value)


def _summarise(
    run: Runs, positions: Sequence[CurvePosition | None], metrics: Sequence[str], draws: Draws
) -> MethodSummary:
    reached = [(curve, position) for curve, position in zip(run.curves, positions, strict=True) if position is not None]
    scores = {name: found for name in metrics if (found := estimate(_rows(reached, name), draws)) is not None}
    costs = {}
    for name in COSTS:
        values = [value for curve, position in reached if (value := cost_at(curve, position, name)) is not None]
        if values:
            costs[name] = float(np.mean(values))
    peaks = [curve.peak_bytes for curve, _ in reached if curve.peak_bytes]
    if peaks:
        costs["peak_bytes"] = max(peaks)
    return MethodSummary(scores, costs, len(reached), len(run.curves), _untrained(run, reached))


def _untrained(run: Runs, reached: Sequence[tuple[Curve, CurvePosition]]) -> bool:
    return not run.training_free and bool(reached) and all(position == CurvePosition(0, 0.0) for _, position in reached)


def _rows(reached: Sequence[tuple[Curve, CurvePosition]], name: str) -> list[Array]:
    return [row for curve, position in reached if (row := score_at(curve, position, name)) is not None]


def _compare(one: Runs, other: Runs, metrics: Sequence[str], draws: Draws) -> PairwiseComparison:
    level = min(best_of_all(one.curves), best_of_all(other.curves))
    sides = [
        [(curve, position) for curve in run.curves if (position := crossing(curve, level)) is not None]
        for run in (one, other)
    ]
    differences = {}
    for name in metrics:
        if (found := difference(_rows(sides[0], name), _rows(sides[1], name), draws)) is not None:
            differences[name] = found
    costs = {}
    for name in COSTS if not (one.training_free or other.training_free) else ():
        spent = [[value for side in reached if (value := cost_at(*side, name)) is not None] for reached in sides]
        if all(spent) and np.mean(spent[1]) > 0:
            costs[name] = float(np.mean(spent[0]) / np.mean(spent[1]))
    untrained = [run.label for run, reached in zip((one, other), sides, strict=True) if _untrained(run, reached)]
    return PairwiseComparison(other.group, one.label, other.label, level, differences, costs, untrained)


def write_results(results: Results, folder: Path) -> Path:
    """Write ``results.json``. Raises UserError when the disk refuses."""
    path = folder / "results.json"
    write_text(path, json.dumps(as_dict(results, folder), indent=1) + "\n")
    return path


def as_dict(results: Results, folder: Path) -> dict[str, Any]:
    """The results as plain values; run folders relative to ``folder``."""
    return {
        "format": 1,
        "sqdf_fast": __version__,
        "protocol": results.protocol.model_dump(mode="json"),
        "metrics": results.metrics,
        "equal_reward": {group or "methods": _level(level) for group, level in results.levels.items()},
        "methods": [_method(results, index, folder) for index in range(len(results.runs))],
        "duels": [_comparison_dict(comparison) for comparison in results.comparisons],
        "tuning": {name: {"chosen": choice.index, "trials": choice.rows} for name, choice in results.choices.items()},
        "environment": results.environment,
    }


def _level(level: Level | None) -> dict[str, Any] | None:
    if level is None:
        return None
    return {"proxy_reward": level.value, "set_by": level.set_by, "does_not_set_it": level.left_out}


def _method(results: Results, index: int, folder: Path) -> dict[str, Any]:
    run = results.runs[index]
    return {
        "name": run.name,
        "label": run.label,
        "group": run.group or "methods",
        "settings": run.settings,
        "cost_is": "of one picture" if run.training_free else "of training",
        "end": _summary_dict(results.end[index]),
        "at_equal_reward": _summary_dict(results.equal[index]),
        "unfinished": {str(seed): reason for seed, reason in run.unfinished.items()},
        "runs": [
            _run(curve, where.relative_to(folder).as_posix(), position)
            for curve, where, position in zip(run.curves, run.folders, results.positions[index], strict=True)
        ],
    }


def _run(curve: Curve, folder: str, position: CurvePosition | None) -> dict[str, Any]:
    return {
        "seed": curve.seed,
        "folder": folder,
        "equal_reward_between": position and {"evaluation": position.before, "weight": position.weight},
        "peak_bytes": curve.peak_bytes,
        "curve": [{"step": point.step, **point.cost, "scores": dict(point.scores)} for point in curve.points],
    }


def _summary_dict(summary: MethodSummary) -> dict[str, Any]:
    return {
        "seeds_that_reach_it": summary.reached,
        "seeds": summary.seeds,
        "scores": {name: found.as_dict() for name, found in summary.scores.items()},
        "cost": summary.costs,
    }


def _comparison_dict(comparison: PairwiseComparison) -> dict[str, Any]:
    return {
        "group": comparison.group or "methods",
        "method": comparison.one,
        "against": comparison.other,
        "proxy_reward": comparison.level,
        "difference": {name: found.as_dict() for name, found in comparison.differences.items()},
        "cost_ratio": comparison.costs,
    }
