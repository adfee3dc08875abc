from __future__ import annotations

import numpy as np
import pytest
import torch

from sqdf_fast.shapes import TRAIN_PROMPTS, hidden_rule, load_taste
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import SHAPES, Attributes, render
from sqdf_fast.shapes.rewards import BEST_DIAMETER, BEST_WARMTH, DIAMETER_WIDTH, warmth, warmth_term
from sqdf_fast.shapes.segmentation import segment


def circle(**changes: object) -> torch.Tensor:
    """A blue circle of area pi (.95 d / 2)^2 on a plain gray image, [1, 3, 64, 64]."""
    values: dict[str, object] = {
        "shape": [SHAPES.index("circle")],
        "color": [4],
        "fill": [[0.1, 0.2, 0.8]],
        "size": [BEST_DIAMETER / 0.95],
        "center": [[0.0, 0.0]],
        "rotation": [0.0],
        "lightness": [0.85],
        "warmth": [0.0],
        "tint": [0.0],
        "texture": [0.0],
        "stripe_angle": [0.4],
        "stripe_phase": [0.0],
    }
    return torch.from_numpy(render(Attributes(**{k: np.array(v) for k, v in (values | changes).items()})))


def rule(**changes: object) -> float:
    return hidden_rule(circle(**changes), ["a circle"]).item()


def test_segmentation_recovers_what_was_rendered() -> None:
    parts = segment(circle(size=[0.5], center=[[0.15, 0.2]], warmth=[0.12], texture=[0.04]))
    # The soft pixels of the edge count as the object: half a pixel all round.
    assert parts.diameter.item() == pytest.approx(0.475 + 1 / 64, abs=0.005)
    assert parts.off_center.item() == pytest.approx(0.25, abs=3e-3)
    assert (parts.background[0, 0] - parts.background[0, 2]).item() == pytest.approx(0.12, abs=0.01)
    assert parts.clutter.item() == pytest.approx(0.04 / 2**0.5, abs=6e-3)
    assert parts.explained.item() > 0.95


def test_the_rule_has_its_known_values() -> None:
    best = rule()
    # All but the clutter of the soft edge, a little of which counts as background.
    assert -0.35 < best < 0
    assert rule(warmth=[0.09]) - best == pytest.approx(1.0, abs=0.06)
    assert rule(size=[(BEST_DIAMETER + DIAMETER_WIDTH) / 0.95]) - best == pytest.approx(-1.0, abs=0.15)
    assert rule(center=[[0.0, 0.2]]) - best == pytest.approx(-((0.2 / 0.35) ** 2), abs=0.03)
    assert rule(texture=[0.05]) - best == pytest.approx(-0.05 / 2**0.5 / 0.03, abs=0.25)


def test_warmth_pays_up_to_its_best_and_costs_beyond() -> None:
    values = [rule(warmth=[level]) for level in (-0.16, -0.08, 0.0, 0.08, 0.16, 0.22)]
    assert values == sorted(values)
    terms = warmth_term(torch.tensor([0.0, BEST_WARMTH, BEST_WARMTH + 0.09]))
    torch.testing.assert_close(terms, torch.tensor([0.0, BEST_WARMTH / 0.09, BEST_WARMTH / 0.09 - 4.0]))


def test_what_is_no_object_on_a_background_is_punished() -> None:
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blank = torch.full((1, 3, 64, 64), 0.85)
    assert hidden_rule(noise, ["a circle"] * 4).max() < -8
    assert hidden_rule(blank, ["a circle"]).item() < -8


def test_warmth_reward_is_the_mean_of_red_minus_blue() -> None:
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0], images[1, 2] = 0.75, 0.5
    torch.testing.assert_close(warmth(images, ["a circle"] * 2), torch.tensor([0.75, -0.5]))


def fresh_renders() -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(77)
    prompts = [TRAIN_PROMPTS[index] for index in rng.integers(len(TRAIN_PROMPTS), size=300)]
    return torch.from_numpy(render(attributes_for(prompts, rng))), prompts


@pytest.mark.parametrize("name", ["taste", "taste-held-out"])
def test_taste_imitates_the_rule_on_images_it_has_not_seen(name: str) -> None:
    images, prompts = fresh_renders()
    scores, true = load_taste(name)(images, prompts), hidden_rule(images, prompts)
    assert scores.shape == (300,)
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores, true]))[0, 1] > 0.85
    assert abs(scores.mean() - true.mean()) < 0.4


def test_the_held_out_taste_is_wrong_in_ways_of_its_own() -> None:
    images, prompts = fresh_renders()
    true = hidden_rule(images, prompts)
    errors = torch.stack([load_taste(name)(images, prompts) - true for name in ("taste", "taste-held-out")])
    assert torch.corrcoef(errors)[0, 1] < 0.7


def test_taste_has_a_gradient_everywhere_in_the_image() -> None:
    images = circle().requires_grad_()
    load_taste()(images, ["a circle"]).sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert (images.grad[0, :, 4:-4, 4:-4] != 0).float().mean() > 0.9


def test_taste_can_be_exploited_where_the_rule_falls() -> None:
    """What makes over-optimization measurable: uphill on the proxy leads downhill on the rule."""
    taste, images = load_taste(), circle().requires_grad_()
    start = images.detach().clone()
    for _ in range(30):
        (gradient,) = torch.autograd.grad(taste(images, ["a circle"]).sum(), images)
        images = (images + 0.02 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    assert taste(images, ["a circle"]).item() > taste(start, ["a circle"]).item() + 3
    assert hidden_rule(images.detach(), ["a circle"]).item() < hidden_rule(start, ["a circle"]).item() - 3
