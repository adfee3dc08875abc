"""DRaFT-LV: the last step's gradient, averaged over the image and noised copies of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sqdf_fast.algorithms.draft import DirectReward, Pass, Start
from sqdf_fast.engine.noise import Stream
from sqdf_fast.kernels import philox_normal
from sqdf_fast.kernels.philox import derive_seeds


class DraftLv(DirectReward):
    """Clark et al., arXiv 2309.17400, the low-variance variant of DRaFT-1.

    x_0 is sampled as in DRaFT-1. Then, n = ``draft_lv.noises`` times, it is noised to the level of the last index and
    denoised by one prediction of the policy,

        x_1 = signal x_0 + noise epsilon,     x0_hat = a x_1 + b m(x_1),

    without a gradient into x_0. The loss is the mean of -r over the n + 1 images and the batch.
    """

    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """States at the last index."""
        del step
        return self.sampled(prompts, seeds, len(self.schedule) - 1)

    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """The last step itself, and n that start from its noised image."""
        noises, last = self.config.draft_lv.noises, len(self.schedule) - 1
        weight = 1 / (size * (noises + 1))
        self.forward()
        x0, *_ = self.walk(start, last)
        reward = self.runtime.score_latents(x0, start.prompts)
        yield Pass(-reward.sum() * weight, reward)
        x0 = x0.detach()
        signal, noise = self.schedule.levels[-1].tolist()
        for number in range(noises):
            self.forward()
            seeds = derive_seeds(Stream.RENOISING, number, ids=start.seeds)
            x = signal * x0 + noise * philox_normal(seeds, self.family.latent_shape, dtype=x0.dtype)
            reward = self.runtime.score_latents(self.predicted(x, start.index, start.prompts), start.prompts)
            yield Pass(-reward.sum() * weight, reward)
