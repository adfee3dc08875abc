from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sqdf_fast.evaluate import ImageSet, evaluate_images, load_judges
from sqdf_fast.rewards import load_reward
from sqdf_fast.shapes import HELD_OUT_PROMPTS, hidden_rule, load_judge
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import render

PROMPTS = [prompt for prompt in HELD_OUT_PROMPTS[::4] for _ in range(4)]


def judges():
    return load_judges("shapes", load_reward("taste"))


@pytest.fixture(scope="module")
def attributes():
    return attributes_for(PROMPTS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def images(attributes):
    return torch.from_numpy(render(attributes))


@pytest.fixture(scope="module")
def base():
    """Embeddings of other renders of the same prompts."""
    others = attributes_for(PROMPTS, np.random.default_rng(1))
    return judges().embed(torch.from_numpy(render(others)))


@pytest.fixture(scope="module")
def found(images, base):
    return evaluate_images(images, PROMPTS, load_reward("taste"), judges(), base=base)


def test_renders_satisfy_their_prompts(found, images):
    assert found["eval_attribute_accuracy"] > 0.9
    assert found["eval_alignment"] > found["eval_alignment_shuffled"] + 0.3
    assert found["eval_true_reward"] == pytest.approx(hidden_rule(images, PROMPTS).mean().item(), abs=1e-5)
    assert 1.1 < found["eval_diversity"] < 1.7
    assert 1.8 < found["eval_vendi"] < 3
    assert found["eval_vendi_all"] > 8
    assert abs(found["eval_distance_to_base"]) < 0.02


@pytest.fixture(scope="module")
def wrong(images):
    """Judged under others' prompts."""
    return evaluate_images(images.roll(9, 0), PROMPTS, load_reward("taste"), judges())


def test_numbers_are_those_of_the_judge_networks(wrong, images):
    networks, image_set = load_judge(), images.roll(9, 0)
    accuracy = networks.attribute_accuracy(image_set, PROMPTS)
    assert accuracy.shape != accuracy.color
    assert wrong["eval_attribute_accuracy"] == pytest.approx(accuracy.mean, abs=1e-6)
    assert wrong["eval_diversity"] == pytest.approx(networks.diversity(image_set, PROMPTS), abs=1e-5)
    assert wrong["eval_alignment"] == pytest.approx(networks.alignment(image_set, PROMPTS).mean().item(), abs=1e-5)


def test_accuracy_without_a_fault_leaves_nothing_open(found, wrong):
    assert [found[f"eval_attribute_accuracy{end}"] for end in ("", "_low", "_high")] == [1, 1, 1]
    assert 0 <= wrong["eval_attribute_accuracy_low"] < wrong["eval_attribute_accuracy"]
    assert wrong["eval_attribute_accuracy"] < wrong["eval_attribute_accuracy_high"] <= 1


def test_accuracy_of_prompts_has_the_mean_of_all(images):
    by_prompt = {}
    found = evaluate_images(images.roll(9, 0), PROMPTS, load_reward("taste"), judges(), by_prompt=by_prompt)
    of_prompts = by_prompt["attribute_accuracy"]
    assert len(of_prompts) == len(set(PROMPTS))
    assert sum(of_prompts) / len(of_prompts) == pytest.approx(found["eval_attribute_accuracy"], abs=1e-12)
    assert min(of_prompts) < found["eval_attribute_accuracy"] < max(of_prompts)
    # Prompts with and without a color count alike where nothing is wrong.
    evaluate_images(images, PROMPTS, load_reward("taste"), judges(), by_prompt=by_prompt)
    assert by_prompt["attribute_accuracy"] == [1.0] * len(set(PROMPTS))


@pytest.mark.parametrize("name", ["true_reward", "alignment", "diversity", "vendi"])
def test_intervals_hold_the_means(found, name):
    assert found[f"eval_{name}_low"] < found[f"eval_{name}"] < found[f"eval_{name}_high"]


def test_wrong_images_are_found_out(wrong, found):
    assert wrong["eval_attribute_accuracy"] < 0.5
    assert wrong["eval_attribute_accuracy_high"] < found["eval_attribute_accuracy_low"]
    assert wrong["eval_alignment_high"] < found["eval_alignment_low"]
    assert wrong["eval_true_reward"] == pytest.approx(found["eval_true_reward"], abs=1e-5)
    assert wrong["eval_distance_to_base"] is None


def test_images_of_one_style_are_far_from_the_base(attributes, base, found):
    names = ("center", "size", "lightness", "warmth", "texture")
    style = {name: np.full_like(getattr(attributes, name), getattr(attributes, name).mean()) for name in names}
    image_set = torch.from_numpy(render(dataclasses.replace(attributes, **style)))
    there = evaluate_images(image_set, PROMPTS, load_reward("taste"), judges(), base=base)
    assert there["eval_distance_to_base_low"] > found["eval_distance_to_base_high"]
    assert there["eval_vendi_high"] < found["eval_vendi_low"]


def test_repeated_images_have_no_diversity(attributes):
    first = torch.from_numpy(render(dataclasses.replace(attributes[np.arange(len(PROMPTS)) // 4 * 4])))
    found = evaluate_images(first, PROMPTS, load_reward("taste"), judges())
    assert found["eval_diversity"] == pytest.approx(0.0, abs=1e-5)
    assert found["eval_vendi"] == pytest.approx(1.0, abs=1e-5)
    once = evaluate_images(first[::4], PROMPTS[::4], load_reward("taste"), judges())
    assert (once["eval_diversity"], once["eval_vendi"]) == (None, None)


def test_prompts_that_name_no_color_are_judged_by_shape():
    prompts = ["a circle", "a star"]
    image_set = torch.from_numpy(render(attributes_for(prompts, np.random.default_rng(1))))
    several = judges()
    judge = several.by_name["attribute_accuracy"]
    assert judge(ImageSet(image_set, prompts, several.embedding)).value == 1.0
    assert judge(ImageSet(image_set.flip(0), prompts, several.embedding)).value == 0.0
