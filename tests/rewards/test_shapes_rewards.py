from __future__ import annotations

import numpy as np
import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import available_rewards, load_reward, preflight
from sqdf_fast.rewards.catalogue import CATALOGUE
from sqdf_fast.shapes import TRAIN_PROMPTS, hidden_rule, load_taste
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import render

PROMPTS = list(TRAIN_PROMPTS[::3])


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(render(attributes_for(PROMPTS, np.random.default_rng(0))))


def test_taste_is_the_shipped_network(images):
    reward = load_reward("taste")
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, load_taste()(images, PROMPTS), rtol=0, atol=0)
    assert scores.shape == (len(PROMPTS),)
    assert scores.dtype == torch.float32
    preflight(reward, images[:4], PROMPTS[:4])


def test_taste_stays_in_single_precision_at_least(images):
    reward = load_reward("taste", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}
    torch.testing.assert_close(reward(images.bfloat16(), PROMPTS), reward(images, PROMPTS), rtol=0, atol=0.2)
    double = load_reward("taste", dtype=torch.float64)
    assert {parameter.dtype for parameter in double.parameters()} == {torch.float64}


def test_taste_imitates_the_hidden_rule_imperfectly(images):
    pair = torch.stack([load_reward("taste")(images, PROMPTS), hidden_rule(images, PROMPTS)])
    assert 0.5 < torch.corrcoef(pair)[0, 1] < 0.999


def test_warmth_is_mean_red_minus_mean_blue():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2, :2] = 0.75, 0.5
    reward = load_reward("warmth")
    assert reward.name == "warmth"
    assert reward(images, ["a", "b"]).tolist() == [0.75, -0.25]
    preflight(reward, images, ["a", "b"])


def test_the_hidden_rule_is_no_training_reward():
    assert {"taste", "warmth", "jpeg", "aesthetic"} < set(available_rewards())
    assert not any("hidden" in card.address for card in CATALOGUE.values())
    for name in ("hidden", "hidden_rule", "true"):
        with pytest.raises(UserError, match="is unknown"):
            load_reward(name)
