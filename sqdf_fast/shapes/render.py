"""Seeded, anti-aliased images of one colored object on a pale background.

Lengths are fractions of the image's side, with the origin at its center, x to the right and y down. An image
is float32 [3, 64, 64] in [0, 1]. The object is drawn from its signed distance, so an edge is one pixel soft.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

SIDE = 64
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.95, 0.82, 0.08),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.14, 0.32, 0.86),
    "purple": (0.52, 0.18, 0.68),
    "pink": (0.97, 0.45, 0.70),
    "black": (0.10, 0.10, 0.12),
}
SIZES = {"small": (0.34, 0.48), "medium": (0.48, 0.62), "large": (0.62, 0.78)}
SIZE_RANGE = (0.34, 0.78)
ROTATION_RANGE = (-0.3, 0.3)
FILL_JITTER = 0.05
LIGHTNESS_RANGE = (0.82, 0.95)
WARMTH_RANGE = (-0.16, 0.16)
TINT_RANGE = (-0.08, 0.08)
TEXTURE_RANGE = (0.0, 0.05)
STRIPE_PERIOD = 0.33
MARGIN = 0.03


@dataclass(frozen=True)
class Attributes:
    """What N images show, one array a property.

    Attributes:
        shape, color: int64 [N], indices into ``SHAPES`` and ``COLORS``.
        fill: [N, 3], the object's RGB, near its color's.
        size, center: [N] and [N, 2], the object's diameter, and its x and y.
        rotation, stripe_angle, stripe_phase: [N], radians.
        lightness, warmth, tint: [N], the background's mean level, red minus blue, and green minus the mean of both.
        texture: [N], amplitude of the background's stripes.
    """

    shape: np.ndarray
    color: np.ndarray
    fill: np.ndarray
    size: np.ndarray
    center: np.ndarray
    rotation: np.ndarray
    lightness: np.ndarray
    warmth: np.ndarray
    tint: np.ndarray
    texture: np.ndarray
    stripe_angle: np.ndarray
    stripe_phase: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | np.ndarray) -> Attributes:
        return Attributes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def background(self) -> np.ndarray:
        """The background's mean RGB, [N, 3]."""
        red = self.lightness + self.warmth / 2 - self.tint / 3
        green = self.lightness + 2 * self.tint / 3
        blue = self.lightness - self.warmth / 2 - self.tint / 3
        return np.stack([red, green, blue], axis=1)


def sample_attributes(
    count: int,
    rng: np.random.Generator,
    shape: np.ndarray | None = None,
    color: np.ndarray | None = None,
    size_range: tuple[np.ndarray, np.ndarray] | None = None,
) -> Attributes:
    """Draw the attributes of ``count`` images; those given are kept, the others are uniform, independent.

    Args:
        shape: int [N]; default: any.
        color: int [N], -1 for any color; default: any.
        size_range: lowest and highest diameter, [N] each; default: the whole range.
    """
    low, high = SIZE_RANGE if size_range is None else size_range
    any_shape = rng.integers(len(SHAPES), size=count)
    any_color = rng.integers(len(COLORS), size=count)
    shape = any_shape if shape is None else np.asarray(shape)
    color = any_color if color is None else np.where(np.asarray(color) < 0, any_color, color)
    palette = np.array(list(COLORS.values()))
    fill = np.clip(palette[color] + rng.uniform(-FILL_JITTER, FILL_JITTER, (count, 3)), 0.0, 1.0)
    size = rng.uniform(low, high, count)
    room = 0.5 - size / 2 - MARGIN
    return Attributes(
        shape=shape,
        color=color,
        fill=fill,
        size=size,
        center=rng.uniform(-1.0, 1.0, (count, 2)) * room[:, None],
        rotation=rng.uniform(*ROTATION_RANGE, count),
        lightness=rng.uniform(*LIGHTNESS_RANGE, count),
        warmth=rng.uniform(*WARMTH_RANGE, count),
        tint=rng.uniform(*TINT_RANGE, count),
        texture=rng.uniform(*TEXTURE_RANGE, count),
        stripe_angle=rng.uniform(0.0, np.pi, count),
        stripe_phase=rng.uniform(0.0, 2 * np.pi, count),
    )


def render(attributes: Attributes) -> np.ndarray:
    """Images of ``attributes``, float32 [N, 3, 64, 64] in [0, 1]."""
    axis = ((np.arange(SIDE) + 0.5) / SIDE - 0.5).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    coverage = np.empty((len(attributes), SIDE, SIDE), np.float32)
    for index, name in enumerate(SHAPES):
        chosen = np.flatnonzero(attributes.shape == index)
        if len(chosen):
            part = attributes[chosen]
            distance = _DISTANCES[name](*_object_frame(part, x, y)) * _column(part.size) / 2
            coverage[chosen] = np.clip(0.5 - distance * SIDE, 0.0, 1.0)
    ground = attributes.background[:, :, None, None] + _stripes(attributes, x, y)[:, None]
    fill = attributes.fill[:, :, None, None]
    image = ground + coverage[:, None] * (fill - ground)
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None]


def _stripes(attributes: Attributes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    along = np.cos(_column(attributes.stripe_angle)) * x + np.sin(_column(attributes.stripe_angle)) * y
    wave = np.sin(along * np.float32(2 * np.pi / STRIPE_PERIOD) + _column(attributes.stripe_phase))
    return _column(attributes.texture) * wave


def _object_frame(attributes: Attributes, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the object's own frame, where its radius is 1 and y points up, [N, 64, 64] each."""
    dx, dy = x - _column(attributes.center[:, 0]), _column(attributes.center[:, 1]) - y
    cos, sin = np.cos(_column(attributes.rotation)), np.sin(_column(attributes.rotation))
    radius = _column(attributes.size) / 2
    return (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slanted = np.abs(x) * np.float32(np.sqrt(0.75)) + (y - 1.0) * np.float32(0.5)
    return np.maximum(slanted, -0.6 - y)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five tips at radius 1, five notches at radius 0.42: distance to the edge line of the folded tenth."""
    tenth = np.float32(np.pi / 5)
    angle = np.abs((np.arctan2(x, y) + tenth) % (2 * tenth) - tenth)
    radius = np.hypot(x, y)
    notch = 0.42 * np.array([np.sin(tenth), np.cos(tenth)])
    edge = notch - np.array([0.0, 1.0])
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    folded_x, folded_y = radius * np.sin(angle), radius * np.cos(angle)
    return folded_x * np.float32(normal[0]) + (folded_y - 1.0) * np.float32(normal[1])


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square standing on its corner and a disc on each of its upper sides."""
    half = 0.56
    lower = y + 0.15
    across = np.float32(np.sqrt(0.5))
    diamond = (np.abs(x) + np.abs(lower)) * across - half
    shift = np.float32(half * np.sqrt(0.5))
    lobes = np.hypot(np.abs(x) - shift, lower - shift) - half
    return np.minimum(diamond, lobes)


_DISTANCES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.22,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "heart": _heart,
}
