from __future__ import annotations

import numpy as np
import pytest

from sqdf_fast.evaluate import bootstrap_interval
from sqdf_fast.evaluate.bootstrap import percentile_interval, resampled_means


def test_interval_of_independent_values_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    low, high = bootstrap_interval(values)
    error = np.std(values) / np.sqrt(400)
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.02)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.02)
    narrow_low, narrow_high = bootstrap_interval(values, level=0.5)
    assert narrow_high - narrow_low == pytest.approx(2 * 0.6745 * error, abs=0.02)


def test_coverage():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.normal(0, 1, 40).tolist(), resamples=400, seed=i) for i in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98


def test_values_of_one_group_count_as_one_draw():
    rng = np.random.default_rng(2)
    of_group = rng.normal(0, 1, 25)
    values = np.repeat(of_group, 16).tolist()
    groups = [f"prompt {i // 16}" for i in range(400)]
    assert bootstrap_interval(values, groups) == pytest.approx(bootstrap_interval(of_group.tolist()), abs=1e-12)
    naive_low, naive_high = bootstrap_interval(values)
    low, high = bootstrap_interval(values, groups)
    assert high - low == pytest.approx(4 * (naive_high - naive_low), rel=0.1)


def test_groups_of_unequal_size_keep_the_mean():
    low, high = bootstrap_interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"], resamples=4000)
    # Means of the draws (a, a), (a, b), (b, b): 1, 2, 5.
    assert (low, high) == (1.0, 5.0)
    narrow = bootstrap_interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"], level=0.4, resamples=4000)
    assert narrow == (2.0, 2.0)


def test_same_seed_same_interval():
    values = [0.1, 0.7, 0.4, 0.9]
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5, resamples=50) != bootstrap_interval(values, seed=6, resamples=50)
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_weights_are_those_of_a_weighted_mean():
    rng = np.random.default_rng(4)
    values, prompts = rng.normal(0, 1, 60), [index // 5 for index in range(60)]
    kept = rng.random(60) < 0.5
    # A weight of nought is as good as not being there, where every group keeps some of its values.
    assert all(kept[start : start + 5].any() for start in range(0, 60, 5))
    weighted = resampled_means(values.tolist(), prompts, kept.astype(float).tolist(), seed=1)
    among_kept = resampled_means(values[kept].tolist(), [p for p, k in zip(prompts, kept, strict=True) if k], seed=1)
    assert weighted == pytest.approx(among_kept, abs=1e-12)


def test_a_resample_without_weight_does_not_count():
    means = resampled_means([1.0, 7.0], ["a", "b"], [0.0, 1.0], resamples=200)
    assert np.isnan(means).any()
    assert set(means[~np.isnan(means)]) == {7.0}
    assert percentile_interval(means) == (7.0, 7.0)
