"""Scores of runs against cost and at equal reward, with bootstrap intervals of means over few seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sqdf_fast.evaluate.judge import Better
from sqdf_fast.runs.metrics import Record
from sqdf_fast.runs.run import Run

PROXY = "proxy_reward"
COSTS = ("unet_evaluations", "reward_evaluations", "seconds")
RESAMPLES = 2000
# A method that gains less than this share of the best gain would compare the others with the base model.
LEARNS = 0.25

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Attributes:
        step: optimizer steps before it.
        scores: means by name, as in the record without ``eval_``.
        by_prompt: scores of each held-out prompt by name, where the record has them.
        cost: training cost so far, by the names of ``COSTS``, where it was counted.
    """

    step: int
    scores: Mapping[str, float]
    by_prompt: Mapping[str, Sequence[float]]
    cost: Mapping[str, float]

    def values(self, name: str) -> Array | None:
        """A score of each prompt, [1] where only the mean is known, or a cost [1]; None if it was not measured."""
        found = self.by_prompt.get(name) or self.cost.get(name, self.scores.get(name))
        return None if found is None else np.atleast_1d(np.asarray(found, dtype=np.float64))


@dataclass(frozen=True)
class CurvePosition:
    """Between two evaluations: ``1 - weight`` of ``before`` and ``weight`` of the one after it."""

    before: int
    weight: float

    @property
    def nearest(self) -> int:
        """The evaluation that is nearest in proxy reward."""
        return self.before + (self.weight > 0.5)


START = CurvePosition(0, 0.0)


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order.

    Attributes:
        peak_bytes: peak memory of the run; None before its first step.
        better: good direction of each judge's score.
    """

    seed: int
    points: list[Point]
    peak_bytes: float | None = None
    better: Mapping[str, Better] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The highest proxy reward of an evaluation."""
        return max(point.scores[PROXY] for point in self.points)

    @property
    def last(self) -> CurvePosition:
        return CurvePosition(len(self.points) - 1, 0.0)


def read_curve(run: Run) -> Curve:
    """The evaluations of a run, without scores that are null."""
    points = [_point(record) for record in run.evaluations if record.get(f"eval_{PROXY}") is not None]
    memory = [record["memory_bytes"] for record in run.steps if record.get("memory_bytes")]
    better = run.evaluations[-1].get("better") if run.evaluations else None
    return Curve(int(run.config.get("seed", 0)), points, max(memory, default=None), better or {})


def _point(record: Record) -> Point:
    scores = {
        key.removeprefix("eval_"): float(value)
        for key, value in record.items()
        if key.startswith("eval_") and not key.endswith(("_low", "_high", "_std")) and isinstance(value, int | float)
    }
    cost = {name: float(record[f"spent_{name}"]) for name in COSTS if record.get(f"spent_{name}") is not None}
    return Point(int(record["step"]), scores, record.get("by_prompt") or {}, cost)


def crossing(curve: Curve, level: float) -> CurvePosition | None:
    """Where the proxy reward first reaches ``level``, by linear interpolation; None if it never does."""
    values = [point.scores[PROXY] for point in curve.points]
    for index, value in enumerate(values):
        if value >= level:
            before = index - 1
            return CurvePosition(before, (level - values[before]) / (value - values[before])) if index else START
    return None


def value_at(curve: Curve, position: CurvePosition, name: str) -> Array | None:
    """A score or cost at a position, with the shapes of :meth:`Point.values`."""
    before = curve.points[position.before].values(name)
    if before is None or position.weight == 0.0:
        return before
    after = curve.points[position.before + 1].values(name)
    return None if after is None else (1 - position.weight) * before + position.weight * after


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts.

    Attributes:
        low, high: 95 % percentile bootstrap interval; None for one seed without scores by prompt.
        over: what was resampled: "seeds and prompts", "seeds", "prompts" or "".
    """

    mean: float
    low: float | None
    high: float | None
    over: str


def resampled_means(values: Array, stream: int) -> Array:
    """Means of resamples of seeds and prompts, [RESAMPLES]. All methods share the same draws of prompts.

    Args:
        values: [seeds, prompts].
        stream: number that separates the draws of one method's seeds from those of another's.
    """
    seeds, prompts = _weights(len(values), 1 + stream), _weights(values.shape[1], 0)
    return ((seeds @ values) * prompts).sum(axis=1)


def _weights(count: int, stream: int) -> Array:
    """Shares [RESAMPLES, count] of each of ``count`` items in resamples with replacement."""
    random = np.random.default_rng((0, stream, count))
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def estimate(rows: Sequence[Array]) -> Estimate | None:
    """The mean of a score over seeds (rows, [prompts] each) with its interval; None without rows."""
    if not rows:
        return None
    values = _stacked(rows)
    return _estimate(float(values.mean()), resampled_means(values, 0), values.shape)


def difference(one: Sequence[Array], other: Sequence[Array]) -> Estimate | None:
    """The mean of ``one`` minus that of ``other``, on the same prompts and independent seeds."""
    if not one or not other:
        return None
    left, right = _stacked(one), _stacked(other)
    if left.shape[1] != right.shape[1]:
        left, right = (values.mean(axis=1, keepdims=True) for values in (left, right))
    means = resampled_means(left, 0) - resampled_means(right, 1)
    return _estimate(float(left.mean() - right.mean()), means, (min(len(left), len(right)), left.shape[1]))


def _stacked(rows: Sequence[Array]) -> Array:
    if len({len(row) for row in rows}) > 1:
        rows = [row.mean(keepdims=True) for row in rows]
    return np.stack(list(rows))


def _estimate(mean: float, means: Array, shape: tuple[int, ...]) -> Estimate:
    over = " and ".join(name for name, count in zip(("seeds", "prompts"), shape, strict=True) if count > 1)
    if not over:
        return Estimate(mean, None, None, "")
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), over)


def best_of_all(curves: Sequence[Curve]) -> float:
    """The highest proxy reward that the runs of all seeds reached."""
    return min(curve.best for curve in curves)


@dataclass(frozen=True)
class Level:
    """The proxy reward at which methods are compared.

    Attributes:
        set_by: weakest of the methods that learn, whose best it is.
        left_out: methods that hardly improve.
    """

    value: float
    set_by: str
    left_out: list[str]


def common_level(methods: Mapping[str, Sequence[Curve]]) -> Level | None:
    """The best proxy reward of the weakest method that gains ``LEARNS`` of the best gain; None without curves."""
    known = {name: curves for name, curves in methods.items() if curves}
    if not known:
        return None
    start = float(np.mean([curve.points[0].scores[PROXY] for curves in known.values() for curve in curves]))
    best = {name: best_of_all(curves) for name, curves in known.items()}
    top = max(best.values()) - start
    learning = {name: value for name, value in best.items() if value - start >= LEARNS * top} if top > 0 else best
    weakest = min(learning, key=lambda name: learning[name])
    return Level(learning[weakest], weakest, [name for name in known if name not in learning])
