"""The main job on the shipped world, shortened: consistency look-ahead, taste reward, all judges."""

from __future__ import annotations

from sqdf_fast.config import make_config
from sqdf_fast.runs import Summary, read_run
from sqdf_fast.training.lifecycle import new_run


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
    # Refills of 16 trajectories of 20 guided steps, then per step 16 states of which two networks run guided.
    refill, step = 16 * 20 * 2, 16 * 2 * 2
    assert all(record["unet_evaluations"] <= refill + step + 16 for record in run.steps)
    assert sum(record["unet_evaluations"] >= refill for record in run.steps) == 2
