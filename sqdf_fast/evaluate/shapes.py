"""The embedded world's own judges, where even the true reward is known. Its networks are tiny and stay on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqdf_fast.evaluate.bootstrap import percentile_interval, resampled_means
from sqdf_fast.evaluate.diversity import Vendi, VendiOfAll
from sqdf_fast.evaluate.embedding import Coordinates
from sqdf_fast.evaluate.judge import ImageJudge, ImageSet, Judge, Measurement, PromptJudge, Values

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
        standardized = (shapes - mean) / (mean * (1 - mean)) ** 0.5
        return torch.cat([self.networks.measures(images), standardized], dim=1).double()


class _NetworkJudge(Judge):
    def __init__(self, networks: Networks) -> None:
        self.networks = networks


class TrueReward(ImageJudge):
    """The rule that the taste reward was made to learn; training never sees it."""

    name = "true_reward"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from sqdf_fast.shapes import hidden_rule

        return hidden_rule(images.cpu(), prompts)


class ShapesAlignment(_NetworkJudge, ImageJudge):
    """Cosine of image and prompt in the embedded world's own pair of towers."""

    name = "alignment"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.networks.alignment(images.cpu(), prompts)


class AttributeAccuracy(_NetworkJudge):
    """Fraction of the shapes and of the colors named in the prompts that a classifier finds, mean of the two."""

    name = "attribute_accuracy"

    def measure(self, image_set: ImageSet) -> Measurement:
        from sqdf_fast.shapes.prompts import named_indices

        seen = image_set.scores(self._seen)
        shapes, colors = map(torch.from_numpy, named_indices(image_set.prompts))
        shares = (seen[:, 0] == shapes).double()
        resampled = resampled_means(shares.tolist(), image_set.prompts)
        colored = colors >= 0
        if colored.any():
            right = (seen[:, 1] == colors).double()
            means = resampled_means(right.tolist(), image_set.prompts, colored.double().tolist())
            # Each image's share of the mean of the two fractions. That of colors is a ratio, since not all prompts
            # name one; linearized about its value, so that the prompts' draw adds nothing where all are right.
            fraction, weight = right[colored].mean(), colored / colored.double().mean()
            shares, resampled = (shares + fraction + (right - fraction) * weight) / 2, (resampled + means) / 2
        by_prompt = Values(shares.tolist(), image_set.prompts).by_prompt
        return Measurement(float(shares.mean()), *percentile_interval(resampled), by_prompt)

    def _seen(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        shape, color, _ = self.networks.attributes(images.cpu().float())
        return torch.stack([shape.argmax(dim=1), color.argmax(dim=1)], dim=1)


class ShapesDiversity(_NetworkJudge, PromptJudge):
    """Mean distance of two images of a prompt over the attributes that it leaves free."""

    name = "diversity"
    description = "attributes that the prompt leaves free"

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        return self.networks.diversity(image_set.images[rows].cpu(), [image_set.prompts[row] for row in rows])


def shapes_judges(networks: Networks) -> list[Judge]:
    """Every judge of the embedded world but the distance to the base model."""
    own = ShapesAlignment(networks), AttributeAccuracy(networks), ShapesDiversity(networks)
    return [TrueReward(), *own, Vendi(), VendiOfAll()]
