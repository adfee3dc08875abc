from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from sqdf_fast.shapes.render import COLORS, SHAPES, SIDE, Attributes, render, sample_attributes
from sqdf_fast.shapes.segmentation import segment


def plain(shape: str, **changes: object) -> Attributes:
    """One upright black object of half the side in the middle of a plain gray image."""
    values: dict[str, object] = {
        "shape": [SHAPES.index(shape)],
        "color": [list(COLORS).index("black")],
        "fill": [[0.0, 0.0, 0.0]],
        "size": [0.5],
        "center": [[0.0, 0.0]],
        "rotation": [0.0],
        "lightness": [0.9],
        "warmth": [0.0],
        "tint": [0.0],
        "texture": [0.0],
        "stripe_angle": [0.0],
        "stripe_phase": [0.0],
    }
    return Attributes(**{name: np.array(value) for name, value in (values | changes).items()})


def coverage(attributes: Attributes) -> np.ndarray:
    """How much of every pixel the black object covers, [64, 64]."""
    return 1 - render(attributes)[0, 0] / 0.9


def test_the_same_seed_draws_the_same_images() -> None:
    first, second = (render(sample_attributes(8, np.random.default_rng(3))) for _ in range(2))
    other = render(sample_attributes(8, np.random.default_rng(4)))
    assert first.shape == (8, 3, SIDE, SIDE)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.1
    assert first.min() >= 0
    assert first.max() <= 1


# Areas of the unit-radius outlines, from their geometry.
AREAS = {
    "circle": np.pi * 0.95**2,
    "ring": np.pi * (0.97**2 - 0.53**2),
    "square": 1.6**2,
    "triangle": 1.6 * (1.6 / np.sqrt(3)),
    "star": 10 * 0.5 * 0.42 * np.sin(np.pi / 5),
    "cross": 2 * 0.6 * 1.9 - 0.6**2,
    "heart": 1.12**2 + np.pi * 0.56**2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_outline(shape: str) -> None:
    area = coverage(plain(shape)).sum() / SIDE**2
    assert area == pytest.approx(AREAS[shape] * 0.25**2, rel=0.02)


def test_center_is_right_and_down() -> None:
    covered = coverage(plain("circle", center=[[0.125, -0.25]]))
    pixel = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    total = covered.sum()
    assert (covered.sum(axis=0) * pixel).sum() / total == pytest.approx(0.125, abs=1e-3)
    assert (covered.sum(axis=1) * pixel).sum() / total == pytest.approx(-0.25, abs=1e-3)


def test_area_grows_with_the_square_of_the_size() -> None:
    small, large = (coverage(plain("star", size=[size])).sum() for size in (0.35, 0.7))
    assert large / small == pytest.approx(4, rel=0.03)


def test_a_triangle_points_up_and_rotation_turns_it_anticlockwise() -> None:
    upright, turned = coverage(plain("triangle")), coverage(plain("triangle", rotation=[0.3]))
    top = np.argwhere(upright > 0.5)[0]
    turned_top = np.argwhere(turned > 0.5)[0]
    assert abs(top[1] - 31.5) < 1
    assert turned_top[1] - 31.5 == pytest.approx(-np.sin(0.3) * 16, abs=1.5)


def test_background_is_what_the_attributes_say() -> None:
    corner = render(plain("circle", warmth=[0.1], tint=[0.06]))[0, :, 0, 0]
    assert corner.mean() == pytest.approx(0.9, abs=1e-6)
    assert corner[0] - corner[2] == pytest.approx(0.1, abs=1e-6)
    assert corner[1] - (corner[0] + corner[2]) / 2 == pytest.approx(0.06, abs=1e-6)


def test_stripes_have_the_texture_as_their_amplitude() -> None:
    row = render(plain("circle", texture=[0.05], center=[[0.0, 0.2]]))[0, 0, 0]
    assert row.max() - 0.9 == pytest.approx(0.05, abs=2e-3)
    assert 0.9 - row.min() == pytest.approx(0.05, abs=2e-3)


def test_objects_stay_inside_and_have_their_color() -> None:
    attributes = sample_attributes(200, np.random.default_rng(0))
    parts = segment(torch.from_numpy(render(replace(attributes, texture=np.zeros(200)))))
    edge = torch.cat([parts.mask[:, 0], parts.mask[:, -1], parts.mask[:, :, 0], parts.mask[:, :, -1]], dim=1)
    assert edge.max() < 0.01
    palette = np.array(list(COLORS.values()))
    nearest = np.linalg.norm(attributes.fill[:, None] - palette, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, attributes.color)


def test_given_attributes_are_kept() -> None:
    color = np.array([-1, 2] * 50)
    low, high = np.full(100, 0.4), np.full(100, 0.41)
    attributes = sample_attributes(
        100, np.random.default_rng(0), shape=np.full(100, 3), color=color, size_range=(low, high)
    )
    assert set(attributes.shape) == {3}
    assert set(attributes.color[1::2]) == {2}
    assert len(set(attributes.color[::2])) == len(COLORS)
    assert attributes.size.min() >= 0.4
    assert attributes.size.max() <= 0.41
    assert {len(getattr(attributes[:7], field.name)) for field in fields(attributes)} == {7}
