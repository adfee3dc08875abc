from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sqdf_fast.evaluate import EmbeddingJudges, ShapesJudges, evaluate_images, load_judges
from sqdf_fast.rewards import load_reward
from sqdf_fast.shapes import HELD_OUT_PROMPTS, hidden_rule
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import render

PROMPTS = [prompt for prompt in HELD_OUT_PROMPTS[::4] for _ in range(4)]


@pytest.fixture(scope="module")
def attributes():
    return attributes_for(PROMPTS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def images(attributes):
    return torch.from_numpy(render(attributes))


@pytest.fixture(scope="module")
def found(images):
    return evaluate_images(images, PROMPTS, load_reward("taste"), ShapesJudges())


def test_renders_satisfy_their_prompts(found, images):
    assert found["eval_attribute_accuracy"] > 0.9
    assert found["eval_alignment"] > found["eval_alignment_shuffled"] + 0.3
    assert found["eval_true_reward"] == pytest.approx(hidden_rule(images, PROMPTS).mean().item(), abs=1e-5)
    assert 1.1 < found["eval_diversity"] < 1.7


def test_wrong_pictures_are_found_out(images, found):
    wrong = evaluate_images(images.roll(9, 0), PROMPTS, load_reward("taste"), ShapesJudges())
    assert wrong["eval_attribute_accuracy"] < 0.5
    assert wrong["eval_alignment"] < found["eval_alignment"] - 0.3
    assert wrong["eval_true_reward"] == pytest.approx(found["eval_true_reward"], abs=1e-5)


def test_repeated_pictures_have_no_diversity(attributes):
    first = dataclasses.replace(attributes[np.arange(len(PROMPTS)) // 4 * 4])
    judges = ShapesJudges()
    assert judges.diversity(torch.from_numpy(render(first)), PROMPTS) == pytest.approx(0.0, abs=1e-5)
    assert judges.diversity(torch.from_numpy(render(first))[::4], PROMPTS[::4]) is None


def test_prompts_that_name_no_colour_are_judged_by_shape():
    prompts = ["a circle", "a star"]
    pictures = torch.from_numpy(render(attributes_for(prompts, np.random.default_rng(1))))
    assert ShapesJudges().attribute_accuracy(pictures, prompts) == 1.0
    assert ShapesJudges().attribute_accuracy(pictures.flip(0), prompts) == 0.0


def test_judges_by_model():
    reward = load_reward("warmth")
    assert isinstance(load_judges("shapes", reward), ShapesJudges)
    other = load_judges("runwayml/some-model", reward)
    assert isinstance(other, EmbeddingJudges)
    assert other.reward is reward
