"""The plots of a comparison: a score against the trained reward, and reward against compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sqdf_fast.compare.curves import COSTS, PROXY, Curve
from sqdf_fast.compare.results import Results
from sqdf_fast.compare.table import label
from sqdf_fast.display.plots import Chart, Point
from sqdf_fast.display.tradeoffs import Series, tradeoff_chart
from sqdf_fast.evaluate.judge import Better

# Of a plot's axes; a judge that measures a property without a good side has no front.
SIGNS: dict[Better, int] = {"higher": 1, "lower": -1, "neither": 0}
COST_LABELS = {"unet_evaluations": "UNet evaluations", "seconds": "training seconds", "reward_evaluations": "rewards"}


def figures(results: Results, group: str) -> dict[str, Chart]:
    """The plots of a group by the name of their file: scores against proxy reward, reward against compute."""
    unplotted = (PROXY, "vendi", "vendi_all", "distance_to_base")
    axes = [(PROXY, score) for score in results.metrics if score not in unplotted]
    axes += [(cost, PROXY) for cost in ("unet_evaluations", "seconds")]
    if "true_reward" in results.metrics:
        axes.append(("unet_evaluations", "true_reward"))
    better = _directions(results)
    drawn = {f"{prefix(group)}_{y}_against_{x}": _chart(results, group, x, y, better) for x, y in axes}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _directions(results: Results) -> dict[str, Better]:
    """Which direction of a cost or score is good, where that may be other than higher."""
    found: dict[str, Better] = dict.fromkeys(("kl", *COSTS), "lower")
    for run in results.runs:
        for curve in run.curves:
            found.update(curve.better)
    return found


def _chart(results: Results, group: str, x: str, y: str, directions: Mapping[str, Better]) -> Chart | None:
    series = []
    for position, index in enumerate(results.of(group)):
        run = results.runs[index]
        # A cost paid for every image does not compare with one that training paid once.
        points = [] if run.training_free and x in COSTS else _mean_points(run.curves, x, y)
        if points:
            series.append(Series.of(run.label, points, position))
    if not series:
        return None
    x_label, y_label = (COST_LABELS.get(name, label(name)) for name in (x, y))
    level = results.levels.get(group)
    return tradeoff_chart(
        f"{y_label[0].upper()}{y_label[1:]} against {x_label}",
        x_label,
        y_label,
        series,
        level.value if level and x == PROXY else None,
        (SIGNS[directions.get(x, "higher")], SIGNS[directions.get(y, "higher")]),
    )


def prefix(group: str) -> str:
    """How the names of a group's files begin."""
    return f"ablation_{group}" if group else "methods"


def _mean_points(curves: Sequence[Curve], x: str, y: str) -> list[Point]:
    """Mean over seeds, evaluation by evaluation, as far as every seed came."""
    points = []
    for row in zip(*(curve.points for curve in curves), strict=False):
        pairs = [(point.cost.get(x, point.scores.get(x)), point.scores.get(y)) for point in row]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known and len(known) == len(pairs):
            across, up = np.asarray(known, dtype=np.float64).mean(axis=0)
            points.append((float(across), float(up)))
    return points
