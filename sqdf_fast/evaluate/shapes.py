"""The embedded world's own judges, where even the true reward is known. Its networks are tiny and stay on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqdf_fast.evaluate.bootstrap import percentile_interval, resampled_means
from sqdf_fast.evaluate.diversity import Vendi, VendiOfAll
from sqdf_fast.evaluate.embedding import Coordinates
from sqdf_fast.evaluate.judge import Judge, Measurement, PictureJudge, Pictures, PromptJudge, Values

if TYPE_CHECKING:
    from sqdf_fast.shapes.judge import Judge as Networks


class ShapesEmbedding(Coordinates):
    """What the judge networks measure, and which shape they see, in standard deviations of the renders, [B, 17]."""

    description = "measures and shape of the embedded world's judge (root mean square difference)"

    def __init__(self, networks: Networks) -> None:
        super().__init__(width=1.0)
        self.networks = networks

    def __call__(self, images: Tensor) -> Tensor:
        images = images.cpu().float()
        shapes = self.networks.attributes(images)[0].softmax(dim=1)
        # A shape drawn evenly among n has mean 1 / n and variance (1 - 1 / n) / n.
        mean = 1 / shapes.shape[1]
        standardised = (shapes - mean) / (mean * (1 - mean)) ** 0.5
        return torch.cat([self.networks.measures(images), standardised], dim=1).double()


class TrueReward(PictureJudge):
    """The rule that the taste reward was made to learn; training never sees it."""

    name = "true_reward"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from sqdf_fast.shapes import hidden_rule

        return hidden_rule(images.cpu(), prompts)


class ShapesAlignment(PictureJudge):
    """Cosine of picture and prompt in the embedded world's own pair of towers."""

    name = "alignment"

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.networks.alignment(images.cpu(), prompts)


class AttributeAccuracy(Judge):
    """Fraction of the shapes and of the colours named in the prompts that a classifier finds, mean of the two."""

    name = "attribute_accuracy"

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def measure(self, pictures: Pictures) -> Measurement:
        from sqdf_fast.shapes.prompts import parse
        from sqdf_fast.shapes.render import COLOURS, SHAPES

        seen = pictures.scores(self._seen)
        named = [parse(prompt) for prompt in pictures.prompts]
        right_shape = (seen[:, 0] == torch.tensor([SHAPES.index(name.shape) for name in named])).double()
        resampled = resampled_means(right_shape.tolist(), pictures.prompts)
        coloured = torch.tensor([name.colour is not None for name in named])
        if not coloured.any():
            return self._measurement(right_shape, resampled, pictures)
        colours = torch.tensor([list(COLOURS).index(name.colour) if name.colour else -1 for name in named])
        right_colour = (seen[:, 1] == colours).double()
        colour_means = resampled_means(right_colour.tolist(), pictures.prompts, coloured.double().tolist())
        # Each picture's share of the mean of the two fractions. That of colours is a ratio, since not all prompts name
        # one; linearised about its value, so that the prompts' draw adds nothing where all are right.
        fraction, weight = right_colour[coloured].mean(), coloured / coloured.double().mean()
        shares = (right_shape + fraction + (right_colour - fraction) * weight) / 2
        return self._measurement(shares, (resampled + colour_means) / 2, pictures)

    def _measurement(self, shares: Tensor, resampled: NDArray[np.float64], pictures: Pictures) -> Measurement:
        of_prompts = Values(shares.tolist(), pictures.prompts).by_prompt
        return Measurement(float(shares.mean()), *percentile_interval(resampled), of_prompts)

    def _seen(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        shape, colour, _ = self.networks.attributes(images.cpu().float())
        return torch.stack([shape.argmax(dim=1), colour.argmax(dim=1)], dim=1)


class ShapesDiversity(PromptJudge):
    """Mean distance of two pictures of a prompt over the attributes that it leaves free."""

    name = "diversity"
    description = "attributes that the prompt leaves free"

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def of_prompt(self, pictures: Pictures, rows: list[int]) -> float:
        return self.networks.diversity(pictures.images[rows].cpu(), [pictures.prompts[row] for row in rows])


def shapes_judges(networks: Networks) -> list[Judge]:
    """Everything that can be told of the embedded world, but for the distance to the base model."""
    return [
        TrueReward(),
        ShapesAlignment(networks),
        AttributeAccuracy(networks),
        ShapesDiversity(networks),
        Vendi(),
        VendiOfAll(),
    ]
