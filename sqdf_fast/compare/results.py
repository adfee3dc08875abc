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
    Draws,
    Estimate,
    Level,
    Place,
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
from sqdf_fast.files import disk_errors

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
    """What there is of one method.

    Attributes:
        label: its name within its group, for people; group: the axis of an ablation, "" for the methods.
        curves: of the finished runs, one a seed; folders: theirs.
        unfinished: seed to the reason in one line.
        free: nothing is trained; costs are those of one picture, each time one is drawn.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    curves: list[Curve]
    folders: list[Path]
    unfinished: dict[int, str]
    free: bool = False


@dataclass(frozen=True)
class Standing:
    """A method at one place of each of its curves.

    Attributes:
        scores, costs: mean over seeds; peak_bytes: the most of any seed.
        reached: of how many seeds the curves come to that place; seeds: how many there are.
        untrained: the place is every curve's first evaluation, before training.
    """

    scores: dict[str, Estimate]
    costs: dict[str, float]
    reached: int
    seeds: int
    untrained: bool

    @property
    def complete(self) -> bool:
        """Whether every seed came there."""
        return 0 < self.reached == self.seeds


@dataclass(frozen=True)
class Duel:
    """Two methods at the best proxy reward of the weaker one.

    Attributes:
        group: of both, as ``Runs.group``.
        one, other: labels; level: the proxy reward; differences: of ``one`` less ``other``, by score.
        costs: ratio of what ``one`` had spent there to what ``other`` had.
        untrained: labels of those that stand there before training.
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
        level: of the methods; levels: of each axis that was ablated.
        end, equal: by position in ``runs``: at the end of training, and at the level of its group.
        duels: the ablated method (default: the first one) against every other and against its variants.
    """

    protocol: Protocol
    runs: list[Runs]
    metrics: list[str]
    levels: dict[str, Level | None]
    end: list[Standing]
    equal: list[Standing]
    places: list[list[Place | None]]
    duels: list[Duel]
    choices: dict[str, Choice]
    environment: dict[str, str]

    def duels_of(self, group: str) -> list[Duel]:
        """Those whose other side stands in a group."""
        return [duel for duel in self.duels if duel.group == group]

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
    """Standings at the end and at equal reward, with bootstrap intervals over seeds and prompts."""
    draws = Draws()
    metrics = _metrics(runs)
    groups = list(dict.fromkeys(run.group for run in runs))
    levels = {
        group: common_level({run.label: run.curves for run in runs if run.group == group and not run.free})
        for group in groups
    }
    places = [[_at(curve, levels[run.group]) for curve in run.curves] for run in runs]
    methods = [run for run in runs if not run.group and run.curves]
    first = next((run for run in methods if run.name == protocol.ablated), methods[0] if methods else None)
    return Results(
        protocol=protocol,
        runs=list(runs),
        metrics=metrics,
        levels=levels,
        end=[_standing(run, [curve.last for curve in run.curves], metrics, draws) for run in runs],
        equal=[_standing(run, found, metrics, draws) for run, found in zip(runs, places, strict=True)],
        places=places,
        duels=[_duel(first, run, metrics, draws) for run in runs if first and run.curves and run.name != first.name],
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


def _at(curve: Curve, level: Level | None) -> Place | None:
    return None if level is None else crossing(curve, level.value)


def _standing(run: Runs, places: Sequence[Place | None], metrics: Sequence[str], draws: Draws) -> Standing:
    there = [(curve, place) for curve, place in zip(run.curves, places, strict=True) if place is not None]
    scores = {name: found for name in metrics if (found := estimate(_rows(there, name), draws)) is not None}
    costs = {}
    for name in COSTS:
        values = [value for curve, place in there if (value := cost_at(curve, place, name)) is not None]
        if values:
            costs[name] = float(np.mean(values))
    peaks = [curve.peak_bytes for curve, _ in there if curve.peak_bytes]
    if peaks:
        costs["peak_bytes"] = max(peaks)
    return Standing(scores, costs, len(there), len(run.curves), _untrained(run, there))


def _untrained(run: Runs, there: Sequence[tuple[Curve, Place]]) -> bool:
    return not run.free and bool(there) and all(place == Place(0, 0.0) for _, place in there)


def _rows(there: Sequence[tuple[Curve, Place]], name: str) -> list[Array]:
    return [row for curve, place in there if (row := score_at(curve, place, name)) is not None]


def _duel(one: Runs, other: Runs, metrics: Sequence[str], draws: Draws) -> Duel:
    level = min(best_of_all(one.curves), best_of_all(other.curves))
    sides = [
        [(curve, place) for curve in run.curves if (place := crossing(curve, level)) is not None]
        for run in (one, other)
    ]
    differences = {}
    for name in metrics:
        if (found := difference(_rows(sides[0], name), _rows(sides[1], name), draws)) is not None:
            differences[name] = found
    costs = {}
    for name in COSTS if not (one.free or other.free) else ():
        spent = [[value for side in there if (value := cost_at(*side, name)) is not None] for there in sides]
        if all(spent) and np.mean(spent[1]) > 0:
            costs[name] = float(np.mean(spent[0]) / np.mean(spent[1]))
    untrained = [run.label for run, there in zip((one, other), sides, strict=True) if _untrained(run, there)]
    return Duel(other.group, one.label, other.label, level, differences, costs, untrained)


def write_results(results: Results, folder: Path) -> Path:
    """Write ``results.json``. Raises UserError when the disk refuses."""
    path = folder / "results.json"
    partial = path.with_name("results.json.partial")
    with disk_errors(path):
        partial.write_text(json.dumps(as_dict(results, folder), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
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
        "duels": [_duel_dict(duel) for duel in results.duels],
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
        "cost_is": "of one picture" if run.free else "of training",
        "end": _standing_dict(results.end[index]),
        "at_equal_reward": _standing_dict(results.equal[index]),
        "unfinished": {str(seed): reason for seed, reason in run.unfinished.items()},
        "runs": [
            _run(curve, where.relative_to(folder).as_posix(), place)
            for curve, where, place in zip(run.curves, run.folders, results.places[index], strict=True)
        ],
    }


def _run(curve: Curve, folder: str, place: Place | None) -> dict[str, Any]:
    return {
        "seed": curve.seed,
        "folder": folder,
        "equal_reward_between": None if place is None else {"evaluation": place.before, "weight": place.weight},
        "peak_bytes": curve.peak_bytes,
        "curve": [{"step": point.step, **point.cost, "scores": dict(point.scores)} for point in curve.points],
    }


def _standing_dict(standing: Standing) -> dict[str, Any]:
    return {
        "seeds_that_reach_it": standing.reached,
        "seeds": standing.seeds,
        "scores": {name: found.as_dict() for name, found in standing.scores.items()},
        "cost": standing.costs,
    }


def _duel_dict(duel: Duel) -> dict[str, Any]:
    return {
        "group": duel.group or "methods",
        "method": duel.one,
        "against": duel.other,
        "proxy_reward": duel.level,
        "difference": {name: found.as_dict() for name, found in duel.differences.items()},
        "cost_ratio": duel.costs,
    }
