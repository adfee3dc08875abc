"""``results.json``: the figures of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqdf_fast import __version__
from sqdf_fast.compare.curves import (
    COSTS,
    PROXY,
    START,
    Array,
    Curve,
    CurvePosition,
    Estimate,
    Level,
    best_of_all,
    common_level,
    crossing,
    difference,
    estimate,
    value_at,
)
from sqdf_fast.compare.protocol import Protocol
from sqdf_fast.compare.tuning import Choice
from sqdf_fast.files import write_text

# Order of the columns. Scores with other names, of held-out rewards and chosen judges, follow the first two.
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
        label: display name within its group.
        group: axis of an ablation; "" for the methods.
        curves, folders: finished runs, one per seed.
        unfinished: one-line reason by seed.
        training_free: whether nothing is trained; costs are then per image.
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
        costs: means over seeds; the maximum of ``peak_bytes``.
        reached: number of seeds whose curve reaches the position.
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
        group: group of ``other``, as ``Runs.group``.
        one, other: labels.
        level: proxy reward at which they are compared.
        differences: ``one`` minus ``other``, by score.
        costs: cost of ``one`` over that of ``other``, up to the level.
        untrained: labels of the methods that reach the level before training.
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
        metrics: names of the scores, in display order.
        levels: levels of equal reward by group, "" for the methods.
        end, equal: summaries by index of ``runs``: at the end of training, and at the level of its group.
        positions: positions of the level of their group on the curves of ``runs``.
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
        return [comparison for comparison in self.comparisons if comparison.group == group]

    @property
    def groups(self) -> list[str]:
        """ "" for the methods, then each axis."""
        return list(dict.fromkeys(run.group for run in self.runs))

    def of(self, group: str) -> list[int]:
        """Indices of a group's runs."""
        return [index for index, run in enumerate(self.runs) if run.group == group]


def make_results(
    protocol: Protocol, runs: Sequence[Runs], choices: Mapping[str, Choice], environment: Mapping[str, str]
) -> Results:
    """Summaries at the end and at equal reward, with bootstrap intervals over seeds and prompts."""
    points = [point for run in runs for curve in run.curves for point in curve.points]
    found = list(dict.fromkeys(name for point in points for name in point.scores))
    others = [name for name in found if name not in KNOWN and name not in HIDDEN]
    metrics = [name for name in (*KNOWN[:2], *others, *KNOWN[2:]) if name in found]
    levels = {
        group: common_level({run.label: run.curves for run in runs if run.group == group and not run.training_free})
        for group in dict.fromkeys(run.group for run in runs)
    }
    positions = [
        [crossing(curve, level.value) if (level := levels[run.group]) else None for curve in run.curves] for run in runs
    ]
    methods = [run for run in runs if not run.group and run.curves]
    first = next((run for run in methods if run.name == protocol.ablated), methods[0] if methods else None)
    return Results(
        protocol=protocol,
        runs=list(runs),
        metrics=metrics,
        levels=levels,
        end=[_summarize(run, [curve.last for curve in run.curves], metrics) for run in runs],
        equal=[_summarize(run, found, metrics) for run, found in zip(runs, positions, strict=True)],
        positions=positions,
        comparisons=[_compare(first, run, metrics) for run in runs if first and run.curves and run.name != first.name],
        choices=dict(choices),
        environment=dict(environment),
    )


def _summarize(run: Runs, positions: Sequence[CurvePosition | None], metrics: Sequence[str]) -> MethodSummary:
    scores = {name: found for name in metrics if (found := estimate(_rows(run, positions, name)))}
    costs = {name: float(np.mean(rows)) for name in COSTS if (rows := _rows(run, positions, name))}
    reached = [curve for curve, position in zip(run.curves, positions, strict=True) if position is not None]
    if peaks := [curve.peak_bytes for curve in reached if curve.peak_bytes]:
        costs["peak_bytes"] = max(peaks)
    return MethodSummary(scores, costs, len(reached), len(run.curves), _untrained(run, positions))


def _rows(run: Runs, positions: Sequence[CurvePosition | None], name: str) -> list[Array]:
    """A score or cost of each curve that reaches its position and has measured it."""
    reached = [(curve, position) for curve, position in zip(run.curves, positions, strict=True) if position is not None]
    return [row for curve, position in reached if (row := value_at(curve, position, name)) is not None]


def _untrained(run: Runs, positions: Sequence[CurvePosition | None]) -> bool:
    return not run.training_free and {position for position in positions if position is not None} == {START}


def _compare(one: Runs, other: Runs, metrics: Sequence[str]) -> PairwiseComparison:
    level = min(best_of_all(one.curves), best_of_all(other.curves))
    sides = [(run, [crossing(curve, level) for curve in run.curves]) for run in (one, other)]

    def rows(name: str) -> list[list[Array]]:
        return [_rows(*side, name) for side in sides]

    differences = {name: found for name in metrics if (found := difference(*rows(name)))}
    costs = {}
    for name in COSTS if not (one.training_free or other.training_free) else ():
        spent = rows(name)
        if all(spent) and np.mean(spent[1]) > 0:
            costs[name] = float(np.mean(spent[0]) / np.mean(spent[1]))
    untrained = [side[0].label for side in sides if _untrained(*side)]
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
        "equal_reward": {
            group or "methods": level
            and {"proxy_reward": level.value, "set_by": level.set_by, "does_not_set_it": level.left_out}
            for group, level in results.levels.items()
        },
        "methods": [_method(results, index, folder) for index in range(len(results.runs))],
        "duels": [
            {
                "group": found.group or "methods",
                "method": found.one,
                "against": found.other,
                "proxy_reward": found.level,
                "difference": {name: asdict(estimate) for name, estimate in found.differences.items()},
                "cost_ratio": found.costs,
            }
            for found in results.comparisons
        ],
        "tuning": {name: {"chosen": choice.index, "trials": choice.rows} for name, choice in results.choices.items()},
        "environment": results.environment,
    }


def _method(results: Results, index: int, folder: Path) -> dict[str, Any]:
    run = results.runs[index]
    end, equal = (
        {
            "seeds_that_reach_it": summary.reached,
            "seeds": summary.seeds,
            "scores": {name: asdict(found) for name, found in summary.scores.items()},
            "cost": summary.costs,
        }
        for summary in (results.end[index], results.equal[index])
    )
    return {
        "name": run.name,
        "label": run.label,
        "group": run.group or "methods",
        "settings": run.settings,
        # A value of files that exist.
        "cost_is": "of one picture" if run.training_free else "of training",
        "end": end,
        "at_equal_reward": equal,
        "unfinished": {str(seed): reason for seed, reason in run.unfinished.items()},
        "runs": [
            {
                "seed": curve.seed,
                "folder": path.relative_to(folder).as_posix(),
                "equal_reward_between": position and {"evaluation": position.before, "weight": position.weight},
                "peak_bytes": curve.peak_bytes,
                "curve": [{"step": point.step, **point.cost, "scores": dict(point.scores)} for point in curve.points],
            }
            for curve, path, position in zip(run.curves, run.folders, results.positions[index], strict=True)
        ],
    }
