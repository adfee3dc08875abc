"""The main job on the shipped world, shortened: consistency look-ahead, taste reward, all judges."""

from __future__ import annotations

import pytest

from sqdf_fast.config import make_config
from sqdf_fast.runs import Summary, read_run
from sqdf_fast.training.lifecycle import new_run

# Refills of 16 trajectories of 20 guided steps, then per step 16 states of which two networks run guided.
REFILL, STEP = 16 * 20 * 2, 16 * 2 * 2


def test_the_default_configuration_takes_a_step(tmp_path):
    one = {"steps": 1, "checkpoint_every": 0, "evaluation": {"every": 0, "num_prompts": 1, "images_per_prompt": 2}}
    new_run(make_config("shapes", flags=one), tmp_path / "run")
    run = read_run(tmp_path / "run")
    (record,) = run.steps
    assert run.config["objective"]["lookahead"] == "consistency"
    assert REFILL + STEP <= record["unet_evaluations"] <= REFILL + STEP + 16
    assert record["kl_mean"] == 0
    assert record["grad_norm"] > 0
    base, tuned = run.evaluations
    assert base["eval_kl"] == 0 < tuned["eval_kl"]


@pytest.mark.slow
def test_a_short_run_of_the_default_configuration_already_pays(tmp_path):
    short = {"steps": 16, "checkpoint_every": 0, "evaluation": {"every": 0, "num_prompts": 8, "images_per_prompt": 4}}
    new_run(make_config("shapes", flags=short), tmp_path / "run")
    run = read_run(tmp_path / "run")
    found = Summary(run.evaluations)
    assert found.proxy_gain > 0.4
    assert found.true_gain > 0
    assert found.accuracy_kept >= 0.9
    assert found.diversity_kept >= 0.8
    assert found.alignment[1] > found.shuffled + 0.3
    assert run.config["objective"]["lookahead"] == "consistency"
    assert all(record["unet_evaluations"] <= REFILL + STEP + 16 for record in run.steps)
    assert sum(record["unet_evaluations"] >= REFILL for record in run.steps) == 2
