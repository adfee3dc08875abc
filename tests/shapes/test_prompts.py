from __future__ import annotations

import numpy as np
import pytest

from sqdf_fast.errors import UserError
from sqdf_fast.shapes import ALL_PROMPTS, HELD_OUT_PROMPTS, TRAIN_PROMPTS
from sqdf_fast.shapes.prompts import Named, attributes_for, parse
from sqdf_fast.shapes.render import COLORS, SHAPES, SIZES


def test_every_prompt_parses_back_to_itself() -> None:
    assert len(ALL_PROMPTS) == len(set(ALL_PROMPTS)) == 7 * 9 * 4
    for prompt in ALL_PROMPTS:
        assert parse(prompt).prompt() == prompt


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a large red star", Named("star", "red", "large")),
        ("a circle", Named("circle")),
        ("an orange ring", Named("ring", "orange")),
        ("a small square", Named("square", size="small")),
        ("A  Blue HEART", Named("heart", "blue")),
    ],
)
def test_parse_names_what_the_prompt_says(prompt: str, named: Named) -> None:
    assert parse(prompt) == named


@pytest.mark.parametrize("prompt", ["", "star", "a red large star", "a dog", "an red star", "a red", "a red star sky"])
def test_a_prompt_outside_the_grammar_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="is not of the form"):
        parse(prompt)


def test_the_split_is_a_partition_by_color_and_shape() -> None:
    assert set(TRAIN_PROMPTS) | set(HELD_OUT_PROMPTS) == set(ALL_PROMPTS)
    assert not set(TRAIN_PROMPTS) & set(HELD_OUT_PROMPTS)
    assert (len(TRAIN_PROMPTS), len(HELD_OUT_PROMPTS)) == (200, 52)
    held = {(parse(prompt).color, parse(prompt).shape) for prompt in HELD_OUT_PROMPTS}
    seen = {(parse(prompt).color, parse(prompt).shape) for prompt in TRAIN_PROMPTS}
    assert not held & seen
    for pairs in (held, seen):
        assert {shape for _, shape in pairs} == set(SHAPES)
        assert {color for color, _ in pairs} >= set(COLORS)


def test_attributes_for_keeps_what_is_named_and_draws_the_rest() -> None:
    prompts = ["a small red star", "a large heart", "a ring"] * 60
    attributes = attributes_for(prompts, np.random.default_rng(0))
    assert [SHAPES[index] for index in attributes.shape[:3]] == ["star", "heart", "ring"]
    assert {list(COLORS)[index] for index in attributes.color[::3]} == {"red"}
    assert len(set(attributes.color[1::3])) == len(COLORS)
    low, high = SIZES["small"]
    assert low <= attributes.size[::3].min()
    assert attributes.size[::3].max() <= high
    assert attributes.size[1::3].min() >= SIZES["large"][0]
    assert attributes.size[2::3].min() < 0.45 < 0.67 < attributes.size[2::3].max()
