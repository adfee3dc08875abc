"""DDPO: the clipped policy gradient of a denoising trajectory's transitions."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from sqdf_fast.algorithms.policy_gradient import Pairs, PolicyGradient
from sqdf_fast.engine.sampler import Keep
from sqdf_fast.kernels.guidance import per_sample


class Ddpo(PolicyGradient):
    """Black et al., arXiv 2305.13301, DDPO-IS; a transition's log-probability as in their ddpo-pytorch:

    log p_theta(x_{t-1} | x_t) = mean over the elements of -(x_{t-1} - mu_theta)^2 / (2 sigma^2) - log(sigma sqrt(2 pi))
    """

    keep: ClassVar[Keep] = "all"

    def _likelihood(self, pairs: Pairs, regularize: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stored, family, table = self._collected.stored, self.family, self.tables.transition
        x, x_prev = (
            stored[pairs.trajectory, pairs.index + later].to(family.device, family.precision) for later in (0, 1)
        )
        mean, kl = self._guided(pairs, x, table, self.config.objective.kl_scale, regularize)
        return gaussian_log_prob(x_prev, mean, table[pairs.index.to(family.device), 2]), kl, kl


def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mean, sigma^2), averaged over the elements of a sample.

    Args:
        x, mean: [B, ...]; sigma: [B], > 0.

    Returns:
        [B].
    """
    square = ((x - mean) / per_sample(sigma, x)).square().flatten(1).mean(1)
    return -0.5 * square - sigma.log() - 0.5 * math.log(2 * math.pi)
