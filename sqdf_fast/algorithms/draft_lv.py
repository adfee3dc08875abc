"""DRaFT-LV: the last step's gradient, averaged over the picture and the same picture noised anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sqdf_fast.algorithms.draft import DirectReward, Pass, Start
from sqdf_fast.engine.noise import Stream
from sqdf_fast.kernels import philox_normal, posterior_mean
from sqdf_fast.kernels.philox import derive_seeds


class DraftLv(DirectReward):
    """Clark et al., arXiv 2309.17400, the low-variance variant of DRaFT-1.

    x_0 is sampled as in DRaFT-1. Then, n = ``draft_lv.noises`` times, it is noised to the level of the last index and
    denoised by one prediction of the policy,

        x_1 = signal x_0 + noise epsilon,     x0_hat = a x_1 + b m(x_1),

    without a gradient into x_0. The loss is the mean of -r over the n + 1 pictures and the batch; their sum would
    differ by the factor n + 1 alone.
    """

    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """States at the last index."""
        del step
        return self.sampled(prompts, seeds, len(self.schedule) - 1)

    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """The last step itself, and n that start from its noised picture."""
        noises, last = self.config.draft_lv.noises, len(self.schedule) - 1
        weight = 1 / (size * (noises + 1))
        self.forward()
        x0, _, _ = self.walk(start, last)
        reward = self.runtime.score_latents(x0, start.prompts)
        yield Pass(-reward.sum() * weight, reward)
        x0 = x0.detach()
        for number in range(noises):
            self.forward()
            reward = self.runtime.score_latents(self._noised_and_denoised(x0, start, number), start.prompts)
            yield Pass(-reward.sum() * weight, reward)

    def _noised_and_denoised(self, x0: Tensor, start: Start, number: int) -> Tensor:
        family = self.family
        signal, noise = self.schedule.levels[-1].tolist()
        seeds = derive_seeds(Stream.RENOISING, number, ids=start.seeds)
        x = signal * x0 + noise * philox_normal(seeds, family.latent_shape, dtype=x0.dtype)
        index = torch.full((len(x),), len(self.schedule) - 1, device=family.device)
        m = self.output("policy", x, index, family.encode(start.prompts))
        return posterior_mean(
            x, m, self.tables.posterior, index, guidance_scale=self.guidance_scale, impl=self.config.impl
        )
