"""What judges the pictures of a model, beside the reward it is trained on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sqdf_fast.rewards import Reward

PIXEL_SIDE = 16


class Judges:
    """Judges nothing; subclasses answer what their model or world can. None means that it cannot be told.

    Images are float [B, 3, H, W] in [0, 1], prompts are B strings.

    Attributes:
        diversity_measure: what :meth:`diversity` compares, in a few words.
    """

    diversity_measure: str | None = None

    def true_reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """What the trained reward stands for, [B]; training never sees it."""
        return None

    def alignment(self, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """How well each picture fits its prompt, [B]."""
        return None

    def attribute_accuracy(self, images: Tensor, prompts: Sequence[str]) -> float | None:
        """Fraction of the attributes named in the prompts that a classifier finds in the pictures."""
        return None

    def diversity(self, images: Tensor, prompts: Sequence[str]) -> float | None:
        """How much pictures of the same prompt differ; None where no prompt occurs twice."""
        return None


class ShapesJudges(Judges):
    """The embedded world, where even the true reward is known. The networks are tiny and stay on the CPU."""

    diversity_measure = "attributes that the prompt leaves free"

    def __init__(self) -> None:
        from sqdf_fast.shapes import load_judge

        self.judge = load_judge()

    def true_reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from sqdf_fast.shapes import hidden_rule

        return hidden_rule(images.cpu(), prompts)

    def alignment(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.judge.alignment(images.cpu(), prompts)

    def attribute_accuracy(self, images: Tensor, prompts: Sequence[str]) -> float:
        accuracy = self.judge.attribute_accuracy(images.cpu(), prompts)
        return accuracy.shape if math.isnan(accuracy.colour) else accuracy.mean

    def diversity(self, images: Tensor, prompts: Sequence[str]) -> float | None:
        found = self.judge.diversity(images.cpu(), prompts)
        return None if math.isnan(found) else found


class EmbeddingJudges(Judges):
    """Any other model: diversity in the embeddings of the reward's own backbone, or of small thumbnails.

    Reward features are compared by 1 - cosine, in [0, 2]; thumbnails of 16 x 16 pixels by the root mean
    square difference of their values, in [0, 1]. Mean over the pairs of a prompt, then over the prompts that
    occur twice.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self._has_features = type(reward).features is not Reward.features
        self.diversity_measure = (
            f"features of the reward {reward.name!r} (1 - cosine)"
            if self._has_features
            else f"thumbnails of {PIXEL_SIDE} x {PIXEL_SIDE} pixels (root mean square difference)"
        )

    @torch.no_grad()
    def diversity(self, images: Tensor, prompts: Sequence[str], batch_size: int = 16) -> float | None:
        embeddings = torch.cat([self._embed(batch) for batch in images.split(batch_size)]).double().cpu()
        members: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            members[prompt].append(index)
        means = [self._distances(embeddings[rows]).mean() for rows in members.values() if len(rows) > 1]
        return float(torch.stack(means).mean()) if means else None

    def _embed(self, images: Tensor) -> Tensor:
        features = self.reward.features(images) if self._has_features else None
        if features is None:
            return F.adaptive_avg_pool2d(images.float(), PIXEL_SIDE).flatten(1)
        return F.normalize(features.float(), dim=1)

    def _distances(self, embeddings: Tensor) -> Tensor:
        """Of every pair of rows, [B (B - 1) / 2]."""
        euclidean = torch.pdist(embeddings)
        # Between unit vectors |a - b|^2 / 2 = 1 - cosine.
        return euclidean.square() / 2 if self._has_features else euclidean / embeddings.shape[1] ** 0.5


def load_judges(model: str, reward: Reward) -> Judges:
    """The judges of ``model``: those of the embedded world for "shapes", embeddings for every other."""
    return ShapesJudges() if model == "shapes" else EmbeddingJudges(reward)
