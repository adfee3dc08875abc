"""How far a model's images are from those of its base model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sqdf_fast.evaluate.bootstrap import group_members, percentile_interval, resampled_groups
from sqdf_fast.evaluate.judge import ImageSet, Judge, Measurement

RESAMPLES = 500


class KernelDistance(Judge):
    """Squared maximum mean discrepancy to the base model's images, with the kernel of KID.

    The kernel is (1 + s)^3, the cubic polynomial of Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401,
    section 4, on the embedding's similarity s. The estimate has no bias at any number of images, unlike a Frechet
    distance, whose covariance matrices 128 images do not determine; near zero it can be negative.
    """

    name = "distance_to_base"
    better = "lower"

    def measure(self, image_set: ImageSet) -> Measurement | None:
        if image_set.base is None:
            return None
        embeddings, base, similarities = image_set.embeddings, image_set.base, image_set.embedding.similarities
        across = (1 + similarities(embeddings, base)) ** 3
        terms = (
            (1 + similarities(embeddings, embeddings)) ** 3 + (1 + similarities(base, base)) ** 3 - across - across.T
        )
        return kernel_distance(terms, image_set.prompts)


class FrechetDistance(Judge):
    """Frechet distance of Gaussians fitted to the embeddings; comparable between sets of equal size only.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, eq. 6, in another space than
    Inception's. Biased upwards by few images, and without interval: a resample repeats images, which the fitted
    covariances take for agreement.
    """

    name = "frechet_to_base"
    better = "lower"

    def measure(self, image_set: ImageSet) -> Measurement | None:
        if image_set.base is None or len(image_set.base) < 2:
            return None
        return Measurement(frechet_distance(image_set.embeddings, image_set.base))


def kernel_distance(terms: Tensor, prompts: list[str]) -> Measurement | None:
    """Mean of the U-statistic's terms over pairs of different prompts, and its bootstrap interval over prompts.

    Images of one prompt are no independent draws, and an image and its counterpart of the same seed even less: such
    pairs are left out, which keeps the estimate unbiased (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012,
    lemma 6) and makes it exactly zero between equal sets. Images of a single prompt count as draws of their own.

    Args:
        terms: k(x, x') + k(y, y') - k(x, y') - k(x', y) for every two images, [N, N].
    """
    member = group_members(prompts if len(set(prompts)) > 1 else range(len(prompts)))
    groups = member.max() + 1
    if groups < 2:
        return None
    belongs = np.eye(groups)[member]
    sums, sizes = belongs.T @ terms.numpy() @ belongs, np.outer(belongs.sum(axis=0), belongs.sum(axis=0))
    for table in (sums, sizes):
        np.fill_diagonal(table, 0)
    drawn = np.eye(groups)[resampled_groups(groups, RESAMPLES)].sum(axis=1)
    weights = np.einsum("rp,pq,rq->r", drawn, sizes, drawn)
    # A resample of one prompt alone has no pair.
    weights[weights == 0] = np.nan
    resampled = np.einsum("rp,pq,rq->r", drawn, sums, drawn) / weights
    return Measurement(float(sums.sum() / sizes.sum()), *percentile_interval(resampled))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of embeddings [n, F] and [m, F], float64, n, m >= 2.

    With centered rows A and B the last trace is the sum of the singular values of A B^T / sqrt((n - 1) (m - 1)): no
    root of an F x F matrix, whose rank n < F would not fill.
    """
    difference = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    # Rounding can leave a little less than nothing.
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(difference.square().sum() + spread))
