"""Advantage weighted matching: the network's own training loss on its samples, weighted by their advantage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sqdf_fast.algorithms.policy_gradient import Pairs, PolicyGradient
from sqdf_fast.config import Config
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.kernels import philox_normal
from sqdf_fast.kernels.guidance import per_sample

POWER, OFFSET = 0.25, 1e-10
"""Of the robust weighting, as the published configurations have them."""


class Awm(PolicyGradient):
    """Xue et al., arXiv 2509.25050. The negative matching loss replaces the log-probability,

        -d,  d = mean over the elements of (m_theta(x_t) - target)^2,  x_t = signal x_0 + noise epsilon

    at new noise for every pair; the target is what the network was pretrained to predict. ``awm.matching`` = "ghuber",
    of the published program, is -((d + 1e-10)^(1/4) - 1e-10^(1/4)) 4 t instead, t in (0, 1] the time. The regularizer
    is alpha times the mean square of policy - reference at x_t, unweighted.
    """

    regularized: ClassVar[bool] = True
    epsilon: ClassVar[float] = 1e-4
    pooled: ClassVar[bool] = True

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        super().__init__(config, runtime, prompts)
        # Rows that return the guided output itself, and its squared distance from the reference's.
        self._output_rows = self.tables.transition.new_tensor([0.0, 1.0, 1.0]).repeat(len(self.schedule), 1)

    def _key(self, pairs: Pairs) -> Tensor:
        return pairs.number

    def _columns(self, rows: int, source: torch.Generator) -> Tensor:
        """One of the trainable indices from each of as many equal stretches, in the order of time."""
        bounds = torch.arange(self.timesteps + 1) * len(self.indices) // self.timesteps
        drawn = torch.rand(rows, self.timesteps, generator=source, dtype=torch.float64)
        return bounds[:-1] + (drawn * bounds.diff()).long()

    def _likelihood(self, pairs: Pairs, regularize: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        family, collection = self.family, self._collected
        x0 = collection.stored[pairs.trajectory].to(family.device, family.precision)
        index = pairs.index.to(family.device)
        seeds = sample_seeds(self.config.seed, Stream.TRANSITION, collection.number, pairs.number)
        epsilon = philox_normal(seeds.to(family.device), family.latent_shape, dtype=x0.dtype, device=family.device)
        x, target = self._noised(x0, epsilon, index)
        output, penalty = self._guided(pairs, x, self._output_rows, 1.0, regularize)
        kl = None
        if penalty is not None:
            kl = penalty.detach() * self.schedule.kl_weight.to(penalty)[index] * self.config.objective.kl_scale
        distance = (output - target).square().flatten(1).mean(1)
        return -self._weighted(distance, index), penalty, kl

    def _noised(self, x0: Tensor, epsilon: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and what the network was pretrained to answer to it, both shaped like x0."""
        signal, noise = (per_sample(level, x0) for level in self.tables.levels[index].unbind(1))
        targets = {
            "epsilon": epsilon,
            "v_prediction": signal * epsilon - noise * x0,
            "sample": x0,
            "flow": epsilon - x0,
        }
        return signal * x0 + noise * epsilon, targets[self.schedule.prediction]

    def _weighted(self, distance: Tensor, index: Tensor) -> Tensor:
        if self.config.awm.matching == "uniform":
            return distance
        time = self.tables.timesteps[index] / self.schedule.num_train_timesteps
        return ((distance + OFFSET) ** POWER - OFFSET**POWER) * time / POWER
