"""How far a mean over few samples can be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: N >= 1 numbers.
        groups: N labels, such as prompts. Values of one label are alike, so whole groups are drawn; without
            labels every value is drawn on its own.
        level: share of the resampled means inside the interval, in (0, 1).

    Returns:
        (low, high); the same arguments give the same interval. One group alone gives (mean, mean).
    """
    numbers = np.asarray(values, dtype=np.float64)
    member = group_members(range(len(numbers)) if groups is None else groups)
    sums = np.bincount(member, weights=numbers)
    counts = np.bincount(member)
    drawn = resampled_groups(len(sums), resamples, seed)
    return percentile_interval(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), level)


def group_members(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """The position of each value's group among the distinct groups, [N]."""
    distinct = {label: position for position, label in enumerate(dict.fromkeys(groups))}
    return np.array([distinct[label] for label in groups], dtype=np.int64)


def resampled_groups(count: int, resamples: int, seed: int = 0) -> NDArray[np.int64]:
    """Which of ``count`` groups each resample draws, with replacement, [resamples, count]."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def percentile_interval(statistics: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of resampled statistics; NaN, a resample that has none, does not count."""
    low, high = np.nanquantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
