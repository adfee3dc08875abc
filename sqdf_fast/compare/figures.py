"""The plots of a comparison: a score against the trained reward, and reward against compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sqdf_fast.compare.curves import COSTS, PROXY, Curve
from sqdf_fast.compare.results import Results
from sqdf_fast.compare.table import label
from sqdf_fast.display.plots import Chart, Point
from sqdf_fast.display.tradeoffs import Series, tradeoff_chart
from sqdf_fast.evaluate.judge import Better

# A judge that measures a property without a good direction has no Pareto front.
SIGNS: dict[Better, int] = {"higher": 1, "lower": -1, "neither": 0}
COST_LABELS = {"unet_evaluations": "UNet evaluations", "seconds": "training seconds", "reward_evaluations": "rewards"}


def figures(results: Results, group: str) -> dict[str, Chart]:
    """The plots of a group by file name: scores against proxy reward, reward against compute."""
    unplotted = (PROXY, "vendi", "vendi_all", "distance_to_base")
    axes = [(PROXY, score) for score in results.metrics if score not in unplotted]
    axes += [(cost, PROXY) for cost in ("unet_evaluations", "seconds")]
    if "true_reward" in results.metrics:
        axes.append(("unet_evaluations", "true_reward"))
    drawn = {f"{prefix(group)}_{y}_against_{x}": _chart(results, group, x, y) for x, y in axes}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _chart(results: Results, group: str, x: str, y: str) -> Chart | None:
    series = []
    for position, run in enumerate(results.runs[index] for index in results.of(group)):
        # A cost paid for every image is not comparable with the one-time cost of training.
        points = [] if run.training_free and x in COSTS else _mean_points(run.curves, x, y)
        if points:
            series.append(Series(run.label, points, position))
    if not series:
        return None
    directions: dict[str, Better] = dict.fromkeys(("kl", *COSTS), "lower")
    for run in results.runs:
        for curve in run.curves:
            directions.update(curve.better)
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
        if pairs and not any(None in pair for pair in pairs):
            across, up = np.asarray(pairs, dtype=np.float64).mean(axis=0)
            points.append((float(across), float(up)))
    return points
