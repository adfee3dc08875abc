"""DDPO: the clipped policy gradient of a denoising trajectory's transitions."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from sqdf_fast.algorithms.policy_gradient import Likelihood, Pairs, PolicyGradient
from sqdf_fast.engine.sampler import Keep
from sqdf_fast.kernels import denoise_step, posterior_mean
from sqdf_fast.kernels.guidance import per_sample


class Ddpo(PolicyGradient):
    """Black et al., arXiv 2305.13301, DDPO-IS; a transition's log-probability as in their ddpo-pytorch:

    log p_theta(x_{t-1} | x_t) = mean over the elements of -(x_{t-1} - mu_theta)^2 / (2 sigma^2) - log(sigma sqrt(2 pi))
    """

    keep: ClassVar[Keep] = "all"

    def _likelihood(self, pairs: Pairs, regularise: bool) -> Likelihood:
        family, collection = self.family, self._collected
        x, x_prev = (
            collection.stored[pairs.trajectory, pairs.index + later].to(family.device, family.precision)
            for later in (0, 1)
        )
        index = pairs.index.to(family.device)
        conditioning = family.encode([collection.prompts[i] for i in pairs.trajectory.tolist()])
        scale, impl, kl = self.guidance_scale, self.config.impl, None
        if regularise:
            with torch.no_grad():
                reference = self.output("reference", x, index, conditioning)
        policy = self.output("policy", x, index, conditioning)
        if regularise:
            # Without noise the step is its mean.
            mean, kl = denoise_step(
                x,
                policy,
                reference,
                self.tables.transition,
                index,
                guidance_scale=scale,
                noise=torch.zeros_like(x),
                kl_scale=self.config.objective.kl_scale,
                impl=impl,
            )
        else:
            mean = posterior_mean(x, policy, self.tables.transition[:, :2], index, guidance_scale=scale, impl=impl)
        log_prob = gaussian_log_prob(x_prev, mean, self.tables.transition[index, 2])
        return Likelihood(log_prob, kl, None if kl is None else kl.detach())


def gaussian_log_prob(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log N(x; mean, sigma^2), averaged over the elements of a sample.

    Args:
        x, mean: [B, ...]; sigma: [B], > 0.

    Returns:
        [B].
    """
    square = ((x - mean) / per_sample(sigma, x)).square().flatten(1).mean(1)
    return -0.5 * square - sigma.log() - 0.5 * math.log(2 * math.pi)
