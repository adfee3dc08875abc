"""Scores of runs against cost and at equal reward, with bootstrap intervals of means over few seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqdf_fast.evaluate.judge import Better
from sqdf_fast.runs.run import Run

PROXY = "proxy_reward"
COSTS = ("unet_evaluations", "reward_evaluations", "seconds")
RESAMPLES = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Attributes:
        step: optimizer steps before it.
        scores: by name, as in the record without ``eval_``.
        by_prompt: scores of each held-out prompt, in their order; empty where the record has none.
        cost: of the training before it, by the names of ``COSTS``; missing where it was not counted.
    """

    step: int
    scores: Mapping[str, float]
    by_prompt: Mapping[str, Sequence[float]]
    cost: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order.

    Attributes:
        peak_bytes: the run's peak, evaluations included; None where no step was made.
        better: which direction of a judge's score is good, by its name.
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
        """The last evaluation."""
        return CurvePosition(len(self.points) - 1, 0.0)


@dataclass(frozen=True)
class CurvePosition:
    """Between two evaluations: ``1 - weight`` of ``before`` and ``weight`` of the one after it."""

    before: int
    weight: float

    @property
    def nearest(self) -> int:
        """The evaluation that is nearest in proxy reward."""
        return self.before + (self.weight > 0.5)


def read_curve(run: Run) -> Curve:
    """The evaluations of a run. Scores that are null are left out."""
    points = [_point(record) for record in run.evaluations if record.get(f"eval_{PROXY}") is not None]
    memory = [record["memory_bytes"] for record in run.steps if record.get("memory_bytes")]
    better = run.evaluations[-1].get("better") if run.evaluations else None
    return Curve(int(run.config.get("seed", 0)), points, max(memory, default=None), better or {})


def _point(record: Mapping[str, Any]) -> Point:
    scores = {
        key.removeprefix("eval_"): float(value)
        for key, value in record.items()
        if key.startswith("eval_") and not key.endswith(("_low", "_high", "_std")) and isinstance(value, int | float)
    }
    cost = {name: float(record[f"spent_{name}"]) for name in COSTS if record.get(f"spent_{name}") is not None}
    return Point(int(record["step"]), scores, record.get("by_prompt") or {}, cost)


def crossing(curve: Curve, level: float) -> CurvePosition | None:
    """Where a curve's proxy reward first reaches ``level``, by linear interpolation; None where it never does."""
    values = [point.scores[PROXY] for point in curve.points]
    for index, value in enumerate(values):
        if value >= level:
            if index == 0:
                return CurvePosition(0, 0.0)
            return CurvePosition(index - 1, (level - values[index - 1]) / (value - values[index - 1]))
    return None


def score_at(curve: Curve, position: CurvePosition, name: str) -> Array | None:
    """A score at a position, of each prompt, or [1] where only the mean is known; None where it is unknown."""
    return _interpolated(curve, position, lambda point: _score(point, name))


def cost_at(curve: Curve, position: CurvePosition, name: str) -> float | None:
    """What training had cost up to a position."""
    found = _interpolated(
        curve,
        position,
        lambda point: None if name not in point.cost else np.array([point.cost[name]], dtype=np.float64),
    )
    return None if found is None else float(found[0])


def _score(point: Point, name: str) -> Array | None:
    if point.by_prompt.get(name):
        return np.asarray(point.by_prompt[name], dtype=np.float64)
    return None if name not in point.scores else np.array([point.scores[name]], dtype=np.float64)


def _interpolated(curve: Curve, position: CurvePosition, read: Any) -> Array | None:
    before = read(curve.points[position.before])
    if before is None or position.weight == 0.0:
        return before
    after = read(curve.points[position.before + 1])
    return None if after is None else (1 - position.weight) * before + position.weight * after


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts.

    Attributes:
        low, high: 95 % percentile bootstrap; None for one seed without scores by prompt.
        over: what was resampled: "seeds and prompts", "seeds", "prompts" or "".
    """

    mean: float
    low: float | None
    high: float | None
    over: str

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "over": self.over}


class Draws:
    """The same draws of prompts for every method: what differs between two of them is then not the prompts' luck."""

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.resamples, self.seed = resamples, seed

    def weights(self, count: int, stream: int) -> Array:
        """Shares [resamples, count] of each of ``count`` things in resamples with replacement."""
        random = np.random.default_rng((self.seed, stream, count))
        return random.multinomial(count, np.full(count, 1 / count), size=self.resamples) / count

    def means(self, values: Array, stream: int) -> Array:
        """Means of resamples of seeds and prompts, [resamples].

        Args:
            values: [seeds, prompts]; stream: distinguishes the seeds of one method from those of another.
        """
        seeds, prompts = self.weights(len(values), 1 + stream), self.weights(values.shape[1], 0)
        return ((seeds @ values) * prompts).sum(axis=1)


def estimate(rows: Sequence[Array], draws: Draws) -> Estimate | None:
    """The mean of a score over seeds (rows, [prompts] each) with its interval; None without rows."""
    values = _stacked(rows)
    if values is None:
        return None
    return _estimate(float(values.mean()), draws.means(values, 0), values.shape)


def difference(one: Sequence[Array], other: Sequence[Array], draws: Draws) -> Estimate | None:
    """The mean of ``one`` less that of ``other``: the same prompts, seeds of their own."""
    left, right = _stacked(one), _stacked(other)
    if left is None or right is None:
        return None
    if left.shape[1] != right.shape[1]:
        left, right = (values.mean(axis=1, keepdims=True) for values in (left, right))
    means = draws.means(left, 0) - draws.means(right, 1)
    return _estimate(float(left.mean() - right.mean()), means, (min(len(left), len(right)), left.shape[1]))


def _stacked(rows: Sequence[Array]) -> Array | None:
    if not rows:
        return None
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
    """The proxy reward that every seed's run reached at some evaluation."""
    return min(curve.best for curve in curves)


@dataclass(frozen=True)
class Level:
    """The proxy reward at which methods are compared.

    Attributes:
        set_by: the weakest of the methods that learn, whose best it is; left_out: methods that hardly move.
    """

    value: float
    set_by: str
    left_out: list[str]


# A method that gains less than this share of what the best one gains would compare the others with the base model.
LEARNS = 0.25


def common_level(methods: Mapping[str, Sequence[Curve]]) -> Level | None:
    """The weakest method's best proxy reward; None without curves.

    Methods whose gain is below ``LEARNS`` of the best one's do not set it.
    """
    known = {name: curves for name, curves in methods.items() if curves}
    if not known:
        return None
    start = float(np.mean([curve.points[0].scores[PROXY] for curves in known.values() for curve in curves]))
    best = {name: best_of_all(curves) for name, curves in known.items()}
    top = max(best.values()) - start
    learning = {name: value for name, value in best.items() if value - start >= LEARNS * top} if top > 0 else best
    weakest = min(learning, key=lambda name: learning[name])
    return Level(learning[weakest], weakest, [name for name in known if name not in learning])
