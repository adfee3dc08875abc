from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from sqdf_fast.compare.curves import (
    Curve,
    CurvePosition,
    Point,
    common_level,
    crossing,
    difference,
    estimate,
    read_curve,
    resampled_means,
    value_at,
)
from sqdf_fast.compare.protocol import Tuning
from sqdf_fast.compare.tuning import Trial, choose
from sqdf_fast.runs.run import Run
from sqdf_fast.runs.samples import Samples


def curve(*proxies: float, seed: int = 0, **scores: list[float]) -> Curve:
    """Evaluations 100 UNet evaluations apart."""
    points = [
        Point(
            10 * i,
            {"proxy_reward": proxy, **{name: found[i] for name, found in scores.items()}},
            {},
            {"unet_evaluations": 100.0 * i, "seconds": 1.0 * i},
        )
        for i, proxy in enumerate(proxies)
    ]
    return Curve(seed, points)


def test_crossing_is_interpolated_between_the_evaluations_around_it():
    found = curve(-1.0, 0.0, 2.0, 1.0, true_reward=[4.0, 6.0, 10.0, 0.0])
    assert crossing(found, 0.5) == CurvePosition(1, 0.25)
    assert value_at(found, CurvePosition(1, 0.25), "true_reward").tolist() == [7.0]
    assert value_at(found, CurvePosition(1, 0.25), "unet_evaluations").tolist() == [125.0]
    assert value_at(found, CurvePosition(1, 0.25), "reward_evaluations") is None
    # The first time: a curve that falls again is not asked there.
    assert crossing(found, 1.5) == CurvePosition(1, 0.75)
    assert crossing(found, 2.0) == CurvePosition(1, 1.0)
    assert crossing(found, -3.0) == CurvePosition(0, 0.0)
    assert crossing(found, 2.1) is None
    assert [CurvePosition(1, 0.4).nearest, CurvePosition(1, 0.6).nearest] == [1, 2]


def test_prompts_are_interpolated_one_by_one():
    points = [
        Point(0, {"proxy_reward": 0.0, "true_reward": 1.0}, {"true_reward": [0.0, 2.0]}, {}),
        Point(5, {"proxy_reward": 1.0, "true_reward": 3.0}, {"true_reward": [4.0, 2.0]}, {}),
    ]
    assert value_at(Curve(0, points), CurvePosition(0, 0.25), "true_reward").tolist() == [1.0, 2.0]
    assert value_at(Curve(0, points), CurvePosition(0, 0.25), "kl") is None


def test_the_level_is_the_weakest_learning_methods_best():
    methods = {
        "strong": [curve(0.0, 2.0), curve(0.0, 1.8)],
        # Its best is before its end; the seed that is worse decides.
        "weak": [curve(0.0, 1.0, 0.4), curve(0.0, 0.9, 0.1)],
        "asleep": [curve(0.0, 0.1)],
        "none": [],
    }
    level = common_level(methods)
    assert (level.value, level.set_by, level.left_out) == (0.9, "weak", ["asleep"])
    assert all(crossing(one, level.value) is not None for name in ("strong", "weak") for one in methods[name])
    assert common_level({"none": []}) is None


def test_estimates_draw_seeds_and_prompts():
    rows = [np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])]
    found = estimate(rows)
    assert found.mean == 1.5
    assert found.over == "seeds and prompts"
    # Seeds alone have sd .5 / sqrt(2), prompts .816 / sqrt(3): together .59.
    assert found.low == pytest.approx(1.5 - 1.96 * 0.59, abs=0.15)
    assert found.high == pytest.approx(1.5 + 1.96 * 0.59, abs=0.15)
    assert asdict(estimate([np.array([2.0])])) == {"mean": 2.0, "low": None, "high": None, "over": ""}
    assert estimate([np.array([2.0]), np.array([4.0])]).over == "seeds"
    assert estimate([np.array([2.0, 4.0])]).over == "prompts"
    assert estimate([]) is None


def test_a_difference_has_the_prompts_in_common():
    luck = np.array([-10.0, 0.0, 10.0])
    found = difference([luck + 1.0, luck + 1.0], [luck, luck])
    # What one prompt gives it gives to both: nothing is left that varies.
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    # Where one side knows means only, both are taken as means.
    assert difference([luck + 1.0, luck + 3.0], [np.array([0.5])]).mean == pytest.approx(1.5)
    assert difference([luck], []) is None


def test_draws_do_not_depend_on_who_asks_first():
    values = np.arange(12.0).reshape(3, 4)
    first = resampled_means(values, 0)
    resampled_means(np.zeros((3, 4)), 1)
    assert np.array_equal(first, resampled_means(values, 0))


def test_a_runs_records_become_a_curve():
    run = Run(
        folder=None,
        config={"seed": 3},
        steps=[{"memory_bytes": 5}, {"memory_bytes": 7}],
        evaluations=[
            {
                "step": 4,
                "eval_proxy_reward": 0.5,
                "eval_proxy_reward_low": 0.4,
                "eval_proxy_reward_std": 1.0,
                "eval_true_reward": None,
                "eval_kl": 0.25,
                "better": {"diversity": "higher", "haste": "lower"},
                "by_prompt": {"proxy_reward": [0.0, 1.0]},
                "spent_unet_evaluations": 90,
                "spent_seconds": 2.5,
            }
        ],
        alarms=[],
        ended="limit",
        samples=Samples([], [], {}),
        environment={},
        plan={},
    )
    found = read_curve(run)
    assert (found.seed, found.peak_bytes, found.best) == (3, 7, 0.5)
    assert found.better == {"diversity": "higher", "haste": "lower"}
    assert found.points == [
        Point(
            4,
            {"proxy_reward": 0.5, "kl": 0.25},
            {"proxy_reward": [0.0, 1.0]},
            {"unet_evaluations": 90.0, "seconds": 2.5},
        )
    ]


TUNING = Tuning(budget="10", trials=3)


def trial(name: str, proxy: float, alignment: float) -> Trial:
    return Trial({"which": name}, curve(0.0, proxy, alignment=[0.5, alignment]))


def test_the_best_trial_that_keeps_alignment_is_chosen():
    found = choose([trial("low", 0.5, 0.5), trial("good", 1.0, 0.46), trial("hacked", 3.0, 0.3)], TUNING)
    assert found.index == 1
    assert [row["kept_enough"] for row in found.rows] == [True, True, False]
    assert found.rows[2]["kept"] == {"alignment": pytest.approx(0.6)}


def test_where_none_keeps_it_the_one_that_keeps_most_is_chosen():
    assert choose([trial("a", 1.0, 0.2), trial("b", 0.5, 0.4), trial("c", 3.0, 0.3)], TUNING).index == 1


def test_failed_trials_are_never_chosen():
    failed = Trial({}, None, "the gradient is not finite")
    found = choose([failed, trial("worse", -1.0, 0.1)], TUNING)
    assert found.index == 1
    assert found.rows[0]["failure"] == "the gradient is not finite"
    assert choose([failed], TUNING).index is None


def test_a_score_without_a_judge_guards_nothing():
    found = choose([Trial({}, curve(0.0, 1.0)), Trial({}, curve(0.0, 2.0))], TUNING)
    assert found.index == 1
