from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.shapes import ALL_PROMPTS, load_judge
from sqdf_fast.shapes.judge import MEASURES, Judge
from sqdf_fast.shapes.prompts import attributes_for, parse
from sqdf_fast.shapes.render import LIGHTNESS_RANGE, SIZE_RANGE, WARMTH_RANGE, Attributes, render


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def fresh() -> tuple[torch.Tensor, list[str], Attributes]:
    rng = np.random.default_rng(4242)
    prompts = [ALL_PROMPTS[index] for index in rng.integers(len(ALL_PROMPTS), size=400)]
    attributes = attributes_for(prompts, rng)
    return torch.from_numpy(render(attributes)), prompts, attributes


def draw(prompts: list[str], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(render(attributes_for(prompts, np.random.default_rng(seed))))


def test_fresh_renders_are_named_rightly(judge: Judge, fresh: tuple[torch.Tensor, list[str], Attributes]) -> None:
    images, prompts, _ = fresh
    accuracy = judge.attribute_accuracy(images, prompts)
    assert accuracy.shape >= 0.97
    assert accuracy.color >= 0.97


def test_images_of_another_prompt_are_named_wrongly(judge: Judge) -> None:
    images = draw(["a red star"] * 8)
    wrong = judge.attribute_accuracy(images, ["a blue circle"] * 8)
    half = judge.attribute_accuracy(images, ["a red circle"] * 8)
    mixed = judge.attribute_accuracy(images, ["a red star"] * 6 + ["a blue star"] * 2)
    assert (wrong.shape, wrong.color, wrong.mean) == (0.0, 0.0, 0.0)
    assert (half.shape, half.color, half.mean) == (0.0, 1.0, 0.5)
    assert (mixed.shape, mixed.color) == (1.0, 0.75)
    assert math.isnan(judge.attribute_accuracy(images, ["a star"] * 8).color)


def test_alignment_prefers_the_own_prompt(judge: Judge, fresh: tuple[torch.Tensor, list[str], Attributes]) -> None:
    images, prompts, _ = fresh
    own, other = judge.alignment(images, prompts), judge.alignment(images, prompts[1:] + prompts[:1])
    assert own.shape == (400,)
    assert own.abs().max() <= 1 + 1e-5
    assert own.mean() > other.mean() + 0.5
    with pytest.raises(UserError, match="not of the form"):
        judge.alignment(images[:1], ["a dog"])


@pytest.mark.parametrize(
    ("measure", "values", "scale"),
    [
        ("size", lambda attributes: attributes.size, SIZE_RANGE),
        ("x", lambda attributes: attributes.center[:, 0], (-0.19, 0.19)),
        ("y", lambda attributes: attributes.center[:, 1], (-0.19, 0.19)),
        ("lightness", lambda attributes: attributes.lightness, LIGHTNESS_RANGE),
        ("warmth", lambda attributes: attributes.warmth, WARMTH_RANGE),
    ],
)
def test_measures_follow_what_was_rendered(
    judge: Judge,
    fresh: tuple[torch.Tensor, list[str], Attributes],
    measure: str,
    values: Callable[[Attributes], np.ndarray],
    scale: tuple[float, float],
) -> None:
    images, _, attributes = fresh
    measured = judge.measures(images)[:, MEASURES.index(measure)]
    wanted = (values(attributes) - np.mean(scale)) / ((scale[1] - scale[0]) / 12**0.5)
    error = np.sqrt(np.mean((measured.numpy() - wanted) ** 2))
    assert error < 0.35


def test_diversity_of_equal_images_is_zero(judge: Judge) -> None:
    images = draw(["a red star"]).repeat(4, 1, 1, 1)
    assert judge.diversity(images, ["a red star"] * 4) == pytest.approx(0.0, abs=1e-4)


def test_diversity_of_independent_renders_is_near_that_of_normal_measures(judge: Judge) -> None:
    prompts = ["a star"] * 24
    assert judge.diversity(draw(prompts), prompts) == pytest.approx(1.35, abs=0.15)


def test_what_the_prompt_names_does_not_count(judge: Judge) -> None:
    """Images that differ in color alone are diverse for a prompt that leaves it free, and only for that one."""
    one = attributes_for(["a star"], np.random.default_rng(1))
    many = one[np.zeros(8, dtype=np.int64)]
    palette = attributes_for(["a star"] * 8, np.random.default_rng(2))
    recolored = Attributes(**{**vars(many), "fill": palette.fill, "color": palette.color})
    images = torch.from_numpy(render(recolored))
    assert judge.diversity(images, ["a star"] * 8) > 0.6
    assert judge.diversity(images, ["a red star"] * 8) < 0.2


def test_diversity_compares_within_a_prompt_only(judge: Judge) -> None:
    red, blue = draw(["a red star"]), draw(["a small blue ring"], seed=5)
    images = torch.cat([red, blue, red, blue])
    prompts = ["a red star", "a small blue ring"] * 2
    assert judge.diversity(images, prompts) == pytest.approx(0.0, abs=1e-4)
    assert math.isnan(judge.diversity(images[:2], prompts[:2]))
    assert parse(prompts[1]).size == "small"
