"""How much images differ, in the space of their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.evaluate.judge import ImageSet, Judge, Measurement, PromptJudge


class EmbeddingDiversity(PromptJudge):
    """Mean distance between two images of the same prompt."""

    name = "diversity"

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        embeddings = image_set.embeddings[rows]
        return mean_of_pairs(image_set.embedding.distances(embeddings, embeddings))


class Vendi(PromptJudge):
    """The effective number of different images among those of one prompt, 1 to their number."""

    name = "vendi"

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        embeddings = image_set.embeddings[rows]
        return vendi_score(image_set.embedding.similarities(embeddings, embeddings))


class VendiOfAll(Judge):
    """The effective number of different images among all. No interval: a resample repeats images."""

    name = "vendi_all"

    def measure(self, image_set: ImageSet) -> Measurement:
        return Measurement(vendi_score(image_set.embedding.similarities(image_set.embeddings, image_set.embeddings)))


def mean_of_pairs(distances: Tensor) -> float:
    """The mean of a symmetric matrix [n, n] beside its diagonal, n >= 2."""
    count = len(distances)
    return float((distances.sum() - distances.diagonal().sum()) / (count * (count - 1)))


def vendi_score(similarities: Tensor) -> float:
    """Exponential of the von Neumann entropy of K / n.

    Friedman & Dieng, "The Vendi Score", arXiv 2210.02410, definition 3.1: 1 for equal images, n for n that have
    nothing in common.

    Args:
        similarities: K, float64 [n, n], positive semi-definite with a diagonal of ones.
    """
    weights = torch.linalg.eigvalsh(similarities / len(similarities)).clamp(min=0)
    return float(torch.special.entr(weights).sum().exp())
