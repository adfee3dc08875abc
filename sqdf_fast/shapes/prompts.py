"""The prompts of the embedded world: "a [small|medium|large] [color] <shape>".

A prompt always names the shape; color and size may be left free. The split is fixed: a (color, shape) pair that is
held out is held out at every size. Pretraining saw every prompt; fine-tuning sees the training prompts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sqdf_fast.errors import UserError
from sqdf_fast.shapes.render import COLORS, SHAPES, SIZE_RANGE, SIZES, Attributes, sample_attributes

WORDS = ("a", "an", *SIZES, *COLORS, *SHAPES)


@dataclass(frozen=True)
class Named:
    """What a prompt names; None where the attribute is free."""

    shape: str
    color: str | None = None
    size: str | None = None

    def prompt(self) -> str:
        words = [word for word in (self.size, self.color, self.shape) if word]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def parse(prompt: str) -> Named:
    """The attributes that ``prompt`` names. Raises UserError where it is not of the grammar."""
    words = prompt.lower().split()
    color = next((word for word in words if word in COLORS), None)
    size = next((word for word in words if word in SIZES), None)
    named = Named(words[-1] if words else "", color, size)
    if named.shape not in SHAPES or named.prompt() != " ".join(words):
        raise UserError(
            f'the prompt {prompt!r} is not of the form "a [{"|".join(SIZES)}] [{"|".join(COLORS)}] '
            f'<{"|".join(SHAPES)}>"; write one of that form'
        )
    return named


def _is_held_out(named: Named) -> bool:
    colors = (None, *COLORS)
    return (2 * colors.index(named.color) + 3 * SHAPES.index(named.shape)) % 5 == 0


_ALL = tuple(Named(shape, color, size) for size in (None, *SIZES) for color in (None, *COLORS) for shape in SHAPES)
ALL_PROMPTS: tuple[str, ...] = tuple(named.prompt() for named in _ALL)
TRAIN_PROMPTS: tuple[str, ...] = tuple(named.prompt() for named in _ALL if not _is_held_out(named))
HELD_OUT_PROMPTS: tuple[str, ...] = tuple(named.prompt() for named in _ALL if _is_held_out(named))


def named_indices(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What prompts name, int64 [N] into ``SHAPES`` and into ``COLORS``, -1 for a free color."""
    named, colors = [parse(prompt) for prompt in prompts], list(COLORS)
    shape = np.array([SHAPES.index(name.shape) for name in named])
    return shape, np.array([colors.index(name.color) if name.color else -1 for name in named])


def attributes_for(prompts: Sequence[str], rng: np.random.Generator) -> Attributes:
    """One image's attributes for every prompt: what it names is kept, the rest is drawn."""
    sizes = [parse(prompt).size for prompt in prompts]
    ranges = np.array([SIZES[size] if size else SIZE_RANGE for size in sizes]).reshape(-1, 2)
    return sample_attributes(len(prompts), rng, *named_indices(prompts), size_range=(ranges[:, 0], ranges[:, 1]))
