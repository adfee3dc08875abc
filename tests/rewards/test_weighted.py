from __future__ import annotations

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import WeightedSum, checked_reward, load_reward, preflight
from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.weighted import Term, options_of, parse_sum


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "def red(images, prompts, factor=1.0):\n    return factor * images[:, 0].mean((1, 2))\n"
        "def blue(images, prompts, power=1):\n    return images[:, 2].mean((1, 2)) ** power\n"
    )
    return name


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("aesthetic*1.0+clip*0.5", [("aesthetic", 1.0), ("clip", 0.5)]),
        ("  aesthetic  +  clip * .5 ", [("aesthetic", 1.0), ("clip", 0.5)]),
        ("aesthetic-v2.5*2+my.own_rewards:score*-0.25", [("aesthetic-v2.5", 2.0), ("my.own_rewards:score", -0.25)]),
        ("jpeg*1e-3+taste*1e+2+warmth*-2.", [("jpeg", 1e-3), ("taste", 100.0), ("warmth", -2.0)]),
        ("taste*3", [("taste", 3.0)]),
    ],
)
def test_expression(spec, terms):
    assert parse_sum(spec) == [Term(*term) for term in terms]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aesthetic*", r"cannot read 'aesthetic\*'; write NAME\*WEIGHT"),
        ("aesthetic+", r"cannot read 'what follows the last \+'"),
        ("aesthetic*two+clip", r"cannot read 'aesthetic\*two\+clip'"),
        ("aesthetic+0.5*clip", r"cannot read '0\.5\*clip'; .*e\.g\. aesthetic\*1\.0 \+ clip\*0\.5"),
        ("taste - warmth*1", r"cannot read 'taste - warmth\*1'; .*a weight may be negative"),
        ("taste+warmth*0", "a weight of 0 for warmth"),
        ("taste+warmth*1e999", "a weight of inf for warmth"),
        ("taste*1+warmth+taste*2", "taste occurs twice"),
        ("taste*nan+warmth", r"cannot read 'taste\*nan\+warmth'"),
    ],
)
def test_expression_that_is_none(spec, message):
    for make in (parse_sum, load_reward):
        with pytest.raises(UserError, match=message) as caught:
            make(spec)
        assert "\n" not in str(caught.value)


def test_unknown_part_is_named():
    with pytest.raises(UserError, match="'tast' is unknown; did you mean 'taste'"):
        load_reward("warmth+tast*0.5")


def test_sum_of_scores_and_of_gradients(module, images):
    reward = load_reward(f"{module}:red*2 + {module}:blue*-0.5 + warmth")
    assert isinstance(reward, WeightedSum)
    assert reward.name == f"{module}:red*2+{module}:blue*-0.5+warmth"
    assert reward.differentiable
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    pixels = images.clone().requires_grad_()
    scores = checked_reward(reward, pixels, ["a"] * 3)
    torch.testing.assert_close(scores, 3 * red - 1.5 * blue)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    expected = torch.tensor([3.0, 0.0, -1.5])[:, None, None].expand(3, 8, 8) / 64
    torch.testing.assert_close(gradient, expected.expand(3, 3, 8, 8))
    preflight(reward, images, ["a"] * 3)


def test_one_term_is_scaled(images):
    scores = load_reward("warmth*-2")(images, ["a"] * 3)
    torch.testing.assert_close(scores, -2 * load_reward("warmth")(images, ["a"] * 3))


def test_options_of_the_parts(module, images):
    sum_of_both = f"{module}:red+{module}:blue*0.5"
    reward = load_reward(sum_of_both, **{f"{module}:red.factor": 3.0, f"{module}:blue.power": 2})
    expected = 3 * images[:, 0].mean((1, 2)) + 0.5 * images[:, 2].mean((1, 2)) ** 2
    torch.testing.assert_close(reward(images, ["a"] * 3), expected)
    with pytest.raises(UserError, match=rf"option 'power': say whose it is in the sum, {module}:red\.power or "):
        load_reward(sum_of_both, power=2)
    with pytest.raises(UserError, match=r"unexpected keyword argument 'facto'.*options given: facto"):
        load_reward(sum_of_both, **{f"{module}:red.facto": 3.0})
    alone = load_reward(f"{module}:red*2", factor=3.0)
    torch.testing.assert_close(alone(images, ["a"] * 3), 6 * images[:, 0].mean((1, 2)))


def test_options_go_to_the_longest_name():
    terms = parse_sum("my*1+my.rewards:score")
    assert options_of(terms, {"my.rewards:score.side": 8, "my.side": 4}) == [{"side": 4}, {"side": 8}]
    dotted = parse_sum("aesthetic-v2.5+clip")
    assert options_of(dotted, {"aesthetic-v2.5.head": "a.pth", "clip.model": "folder"}) == [
        {"head": "a.pth"},
        {"model": "folder"},
    ]


class Recording(Reward):
    def __init__(self, features):
        super().__init__()
        self.found, self.calls = features, []

    def forward(self, images, prompts):
        return images.mean((1, 2, 3))

    def encode_prompts(self, prompts):
        self.calls.append(list(prompts))

    def drop_text_tower(self):
        self.calls.append("dropped")

    def features(self, images):
        return self.found


def test_parts_are_told_of_prompts_and_asked_for_features(images):
    features = torch.rand(3, 4)
    parts = [Recording(None), Recording(features), Recording(torch.zeros(3, 2))]
    reward = WeightedSum("a+b+c", parts, [1.0, 1.0, 1.0])
    reward.encode_prompts(["a cat"])
    reward.drop_text_tower()
    assert [part.calls for part in parts] == [[["a cat"], "dropped"]] * 3
    assert reward.features(images) is features
    assert WeightedSum("a", parts[:1], [1.0]).features(images) is None


def test_precision_of_the_parts(images):
    reward = load_reward("taste*0.5+warmth*2")
    assert reward(images.bfloat16(), ["a"] * 3).dtype == torch.float32
    assert load_reward("taste*0.5+warmth", dtype=torch.float64)(images.double(), ["a"] * 3).dtype == torch.float64
