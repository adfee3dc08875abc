from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sqdf_fast.monitor import check, is_good, new_alarm, watched
from sqdf_fast.training.watch import BestWeights

RECORDED = Path(__file__).parents[1] / "bench" / "study" / "monitor_results.json"
# Half the width of a 95 % interval, as the recorded runs have them: 64 images of 32 prompts.
HALF = {"proxy_reward": 0.25, "held_out_taste_held_out": 0.2, "alignment": 0.025, "attribute_accuracy": 0.09}
FIRST = {"proxy_reward": -1.5, "held_out_taste_held_out": -1.4, "alignment": 0.59, "attribute_accuracy": 1.0}


def evaluation(step: int, half: dict[str, float] = HALF, **values: float | None) -> dict:
    record: dict = {"kind": "evaluation", "step": step, "eval_kl": step / 100}
    for name, value in values.items():
        width = half.get(name)
        ends = (None, None) if value is None or width is None else (value - width, value + width)
        record |= {f"eval_{name}": value, f"eval_{name}_low": ends[0], f"eval_{name}_high": ends[1]}
    return record


def curves(**values: list[float | None]) -> list[dict]:
    """Evaluations every 5 steps; the proxy rises unless it is given."""
    length = len(next(iter(values.values())))
    values = {"proxy_reward": [0.1 * index for index in range(length)], **values}
    return [evaluation(5 * i, **{name: curve[i] for name, curve in values.items()}) for i in range(length)]


def alarm_steps(evaluations: list[dict]) -> list[int]:
    """Where a run with these evaluations says an alarm."""
    counts = range(1, len(evaluations) + 1)
    return [alarm.step for count in counts if (alarm := new_alarm(evaluations[:count])) is not None]


def healthy_run(rng: np.random.Generator, length: int = 17, noise: float = 1.0) -> list[dict]:
    """Rewards rise and saturate, the other judges stay; ``noise``: of an evaluation, in standard errors."""
    rise = 2 * (1 - np.exp(-np.arange(length) / (length / 4)))
    shapes = {"proxy_reward": rise, "held_out_taste_held_out": 0.8 * rise, "alignment": 0 * rise}
    shapes["attribute_accuracy"] = 0 * rise
    values = {
        name: FIRST[name] + shape + noise * HALF[name] / 1.96 * rng.standard_normal(length)
        for name, shape in shapes.items()
    }
    return curves(**{name: value.tolist() for name, value in values.items()})


def turning_run(rng: np.random.Generator, turn: int, fall: float, noise: float = 0.5) -> list[dict]:
    """As a healthy run, but the held-out reward loses ``fall`` half-widths of its interval at every evaluation."""
    evaluations = healthy_run(rng, noise=noise)
    for index, record in enumerate(evaluations):
        lost = fall * HALF["held_out_taste_held_out"] * max(0, index - turn)
        for end in ("", "_low", "_high"):
            record[f"eval_held_out_taste_held_out{end}"] -= lost
        # The proxy goes on rising.
        record["eval_proxy_reward"] += 0.1 * max(0, index - turn)
    return evaluations


def test_noise_alone_is_no_alarm() -> None:
    """Evaluations share prompts and seeds: their own noise is a part of a standard error."""
    rng = np.random.default_rng(0)

    def alarmed(noise: float) -> bool:
        evaluations = healthy_run(rng, noise=noise)
        return any(check(evaluations[:count]) for count in range(3, len(evaluations) + 1))

    # Three judges, 17 evaluations. Even where nothing were shared, fewer than one run in twelve would be accused.
    assert sum(alarmed(0.5) for _ in range(1000)) == 0
    assert sum(alarmed(1.0) for _ in range(300)) < 25


def test_a_turn_is_seen_when_the_intervals_come_apart() -> None:
    rng = np.random.default_rng(1)
    lags = {1.0: [], 2.0: []}
    for fall, found in lags.items():
        for _ in range(100):
            steps = alarm_steps(turning_run(rng, turn=8, fall=fall))
            assert len(steps) == 1
            found.append(steps[0] // 5 - 8)
    # Beyond 2 half-widths after the third and the second evaluation, and one more for certainty.
    assert np.median(lags[1.0]) == 4
    assert max(lags[1.0]) <= 5
    assert np.median(lags[2.0]) == 3
    assert min(lags[2.0]) >= 2


def test_an_alarm_says_what_fell_and_since_when() -> None:
    evaluations = curves(
        held_out_hps=[None] * 5,
        alignment=[0.58, 0.59, 0.58, 0.50, 0.49],
        attribute_accuracy=[1.0, 0.99, 0.95, 0.9, 0.9],
    )
    assert check(evaluations[:4]) is None
    alarm = check(evaluations)
    assert alarm is not None
    assert (alarm.step, alarm.best_step) == (20, 10)
    assert alarm.record() == {
        "kind": "alarm",
        "step": 20,
        "best_step": 10,
        "judges": ["alignment"],
        "reason": "since step 10 (KL 0.1, now 0.2) the trained reward rose from 0.2 to 0.4 "
        "while alignment fell from 0.59 to 0.49",
    }


def test_one_bad_evaluation_is_no_alarm() -> None:
    assert alarm_steps(curves(alignment=[0.59, 0.59, 0.3, 0.59, 0.3, 0.59])) == []


def test_an_alarm_is_said_once_and_again_after_a_recovery() -> None:
    assert alarm_steps(curves(alignment=[0.59, 0.59, 0.3, 0.3, 0.2, 0.59, 0.59, 0.3, 0.3])) == [15, 40]


def test_a_run_whose_proxy_fell_with_the_judges_is_not_over_optimised() -> None:
    falling = [0.0, 0.5, -0.5, -1.0]
    assert alarm_steps(curves(proxy_reward=falling, alignment=[0.5, 0.59, 0.3, 0.2])) == []


def test_each_judge_may_lose_its_share() -> None:
    narrow = {"alignment": 0.001, "attribute_accuracy": 0.001, "diversity": 0.01}

    def steps(**values: list[float]) -> list[int]:
        records = [
            evaluation(5 * i, narrow, proxy_reward=float(i), **{name: curve[i] for name, curve in values.items()})
            for i in range(4)
        ]
        return alarm_steps(records)

    assert steps(alignment=[0.5, 0.5, 0.48, 0.48]) == []
    assert steps(alignment=[0.5, 0.5, 0.47, 0.47]) == [15]
    assert steps(diversity=[1.0, 0.8, 0.6, 0.52]) == []
    assert steps(diversity=[1.0, 0.8, 0.49, 0.45]) == [15]


def test_the_true_reward_is_not_listened_to() -> None:
    fallen = curves(true_reward=[1.0, 0.0, -9.0, -12.0])
    for record in fallen:
        record |= {
            "eval_true_reward_low": record["eval_true_reward"],
            "eval_true_reward_high": record["eval_true_reward"],
        }
    assert watched(fallen) == []
    assert alarm_steps(fallen) == []


def test_intervals_that_say_nothing_give_no_alarm() -> None:
    absent = curves(held_out_mine=[1.0, 0.0, -1.0, -2.0])
    assert watched(absent) == ["eval_held_out_mine"]
    assert alarm_steps(absent) == []
    # One prompt alone: no width.
    for record in absent:
        record |= dict.fromkeys(("eval_held_out_mine_low", "eval_held_out_mine_high"), record["eval_held_out_mine"])
    assert alarm_steps(absent) == []
    assert check([]) is None


def test_the_weights_of_the_last_good_evaluation_are_kept(tmp_path: Path) -> None:
    evaluations = curves(alignment=[0.55, 0.59, 0.58, 0.4, 0.4])
    best = BestWeights(tmp_path / "best")
    for count in range(1, 6):
        written = str(count)
        best.keep(evaluations[:count], lambda folder, text=written: (folder / "weights").write_text(text))
        assert is_good(evaluations[:count]) == (count < 4)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step_000010"]
    alarm = check(evaluations)
    assert alarm is not None
    policy = tmp_path / "lora"
    policy.mkdir()
    (policy / "weights").write_text("last")
    assert not best.restore(5, policy)
    assert (policy / "weights").read_text() == "last"
    assert best.restore(alarm.best_step, policy)
    assert (policy / "weights").read_text() == "3"


def recorded(name: str, seed: int) -> list[dict]:
    (found,) = [
        run for run in json.loads(RECORDED.read_text(encoding="utf-8")) if (run["run"], run["seed"]) == (name, seed)
    ]
    return found["evaluations"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recorded_draft_gives_an_alarm_near_the_peak_of_the_true_rule(seed) -> None:
    evaluations = recorded("draft", seed)
    true = [record["eval_true_reward"] for record in evaluations]
    peak = true.index(max(true))
    assert true[-1] < true[0] < true[peak]
    (step,) = alarm_steps(evaluations)
    assert abs([record["step"] for record in evaluations].index(step) - peak) <= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recorded_sqdf_gives_none(seed) -> None:
    evaluations = recorded("sqdf", seed)
    assert evaluations[-1]["eval_true_reward"] > evaluations[0]["eval_true_reward"] + 1.5
    assert {"eval_held_out_taste_held_out", "eval_alignment"} <= set(watched(evaluations))
    assert alarm_steps(evaluations) == []
