"""Judges of the embedded world: do images fit their prompts, and do they differ where the prompts leave them free.

Two networks, trained on renders that neither the pipeline nor the taste network saw: a CLIP-like pair of towers whose
cosine is the alignment, and an attribute network that names the shape and the color and measures the object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from sqdf_fast.shapes.prompts import WORDS, named_indices, parse
from sqdf_fast.shapes.render import (
    COLORS,
    LIGHTNESS_RANGE,
    ROTATION_RANGE,
    SHAPES,
    SIZE_RANGE,
    TEXTURE_RANGE,
    WARMTH_RANGE,
    Attributes,
)
from sqdf_fast.shapes.rewards import WEIGHTS
from sqdf_fast.shapes.segmentation import segment

LEARNED_MEASURES = ("red", "green", "blue", "size", "x", "y", "rotation")
MEASURES = (*LEARNED_MEASURES, "lightness", "warmth", "texture")
_COLOR_MEASURES = {0, 1, 2}
_SIZE_MEASURE = 3
_OUTSIDE = 4.0

# Mean and standard deviation of every measure over renders of any prompt. For x and y the spread left by the mean
# room around an object; for the texture that of a sine wave's standard deviation.
_SPREAD = (SIZE_RANGE, (-0.19, 0.19), (-0.19, 0.19), ROTATION_RANGE, LIGHTNESS_RANGE, WARMTH_RANGE, TEXTURE_RANGE)
_SCALES = torch.tensor(
    [(float(np.mean(level)), float(np.std(level))) for level in zip(*COLORS.values(), strict=True)]
    + [((low + high) / 2, (high - low) / 12**0.5) for low, high in _SPREAD]
)


def standardize(values: torch.Tensor) -> torch.Tensor:
    """Measures [N, 10] or their first columns in standard deviations of the renders."""
    scales = _SCALES[: values.shape[1]]
    return (values - scales[:, 0]) / scales[:, 1]


def learned_measures(attributes: Attributes) -> torch.Tensor:
    """What the network learns to measure, standardized, float32 [N, 7] in the order of ``LEARNED_MEASURES``."""
    columns = [attributes.fill, attributes.size[:, None], attributes.center, attributes.rotation[:, None]]
    return standardize(torch.from_numpy(np.concatenate(columns, axis=1)).float())


def background_measures(images: torch.Tensor) -> torch.Tensor:
    """Lightness, warmth and texture of the segmented background, [B, 3] in the units of the renderer."""
    parts = segment(images)
    red, _, blue = parts.background.unbind(dim=1)
    return torch.stack([parts.background.mean(dim=1), red - blue, parts.clutter * 2**0.5], dim=1)


class Trunk(nn.Sequential):
    """Images [B, 3, 64, 64] in [0, 1] to features [B, 4 * 4 * width]: four strided convolutions."""

    def __init__(self, width: int) -> None:
        widths = (3, width // 2, width, width, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.GroupNorm(4, after), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Flatten())


class AttributeNetwork(nn.Module):
    """Shape and color logits and standardized measures of images."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        self.hidden = nn.Linear(16 * width, 128)
        self.head = nn.Linear(128, len(SHAPES) + len(COLORS) + len(LEARNED_MEASURES))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, 3, 64, 64] to shape logits [B, 7], color logits [B, 8] and measures [B, 7]."""
        output = self.head(F.silu(self.hidden(self.trunk(images - 0.5))))
        shape, color, measures = output.split([len(SHAPES), len(COLORS), len(LEARNED_MEASURES)], dim=1)
        return shape, color, measures


class AlignmentPair(nn.Module):
    """An image tower and a prompt tower; the cosine of their embeddings is high where the image fits."""

    def __init__(self, width: int = 32, embedding: int = 48) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        # The layer's name is a key of the shipped weights.
        self.picture = nn.Linear(16 * width, embedding)
        self.words = nn.EmbeddingBag(len(WORDS), 64, mode="sum")
        self.prompt = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, embedding))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.offset = nn.Parameter(torch.tensor(-5.0))

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 64, 64] in [0, 1] to unit vectors [B, 48]."""
        return F.normalize(self.picture(self.trunk(images - 0.5)), dim=1)

    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [B, 48]. Raises UserError for a prompt outside the grammar."""
        words = [[WORDS.index(word) for word in parse(prompt).prompt().split()] for prompt in prompts]
        offsets = np.cumsum([0, *map(len, words)])[:-1]
        bag = torch.tensor([index for indices in words for index in indices])
        return F.normalize(self.prompt(self.words(bag, torch.from_numpy(offsets))), dim=1)


@dataclass(frozen=True)
class AttributeAccuracy:
    """Fractions of images that show what their prompt names; ``color`` counts prompts that name one."""

    shape: float
    color: float

    @property
    def mean(self) -> float:
        return (self.shape + self.color) / 2


class Judge(nn.Module):
    """The two networks and what they say about images made for prompts of the grammar.

    Images are float [B, 3, 64, 64] in [0, 1]; a prompt outside the grammar raises UserError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attributes = AttributeNetwork()
        self.pair = AlignmentPair()

    @torch.no_grad()
    def alignment(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Cosine of every image and its own prompt, [B]."""
        return (self.pair.embed_images(images.float()) * self.pair.embed_prompts(prompts)).sum(dim=1)

    @torch.no_grad()
    def attribute_accuracy(self, images: torch.Tensor, prompts: Sequence[str]) -> AttributeAccuracy:
        """How often the shape and the color are those named; NaN color where no prompt names one."""
        shape, color, _ = self.attributes(images.float())
        shapes, colors = map(torch.from_numpy, named_indices(prompts))
        right_shape = (shape.argmax(dim=1) == shapes).float()
        right_color = (color.argmax(dim=1) == colors)[colors >= 0].float()
        return AttributeAccuracy(float(right_shape.mean()), float(right_color.mean()))

    @torch.no_grad()
    def measures(self, images: torch.Tensor) -> torch.Tensor:
        """Standardised measures in the order of ``MEASURES``, [B, 10], clamped to 4 standard deviations.

        Those of the object come from the network, those of the background from the segmentation.
        """
        learned = self.attributes(images.float())[2]
        background = (background_measures(images) - _SCALES[-3:, 0]) / _SCALES[-3:, 1]
        return torch.cat([learned, background], dim=1).clamp(-_OUTSIDE, _OUTSIDE)

    @torch.no_grad()
    def diversity(self, images: torch.Tensor, prompts: Sequence[str]) -> float:
        """Mean distance between images of the same prompt over the attributes it leaves free.

        The distance is the root mean square difference of the measures of the unnamed attributes; it is averaged
        over the pairs of a prompt, then over the prompts that have two images or more. Independent renders give
        about 1.4, equal images 0; NaN where no prompt occurs twice.
        """
        measures = self.measures(images)
        rows: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            rows[prompt].append(index)
        means = []
        for prompt, indices in rows.items():
            if len(indices) > 1:
                named = parse(prompt)
                taken = [*(_COLOR_MEASURES if named.color else ()), *([_SIZE_MEASURE] if named.size else ())]
                free = measures[indices][:, [index for index in range(len(MEASURES)) if index not in taken]]
                means.append(torch.pdist(free).mean() / free.shape[1] ** 0.5)
        return float(torch.stack(means).mean()) if means else float("nan")


def load_judge(path: Path = WEIGHTS / "judge.safetensors") -> Judge:
    """The judge of a safetensors file, in float32 and evaluation mode."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)
