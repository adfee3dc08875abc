"""The joint executor: policy, look-ahead, decode and reward in one autograd graph, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Objective
from sqdf_fast.families import Conditioning
from sqdf_fast.kernels import denoise_step, discounted_loss, posterior_mean
from sqdf_fast.objective import credit_weight, temperature
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.schedule import DenoisingSchedule, Lookahead

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, per sample and detached.

    Attributes:
        loss: of the whole batch; reward, kl: [B]; index: [B] positions in the schedule.
    """

    loss: float
    reward: Tensor
    kl: Tensor
    index: Tensor


class JointExecutor:
    """Adds the gradient of the SQDF loss to the policy's parameters.

    loss = 1/B sum_b [ -w_b r(x0_hat(x_{t-1}))_b + alpha KL_b ],  x_{t-1} from the current policy, w = gamma^k.

    Args:
        backbone: network and roles; schedule: coefficients of the sampler.
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B]; raises UserError when it misbehaves.
        objective: the loss's settings; guidance_scale: of policy and reference.
        micro_batch_size: samples whose graph is in memory at once; the gradient does not depend on it.
        impl: implementation of the kernels.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: DenoisingSchedule,
        reward: RewardFunction,
        objective: Objective,
        *,
        guidance_scale: float,
        micro_batch_size: int,
        impl: str = "auto",
    ) -> None:
        self.backbone, self.schedule, self.reward, self.objective = backbone, schedule, reward, objective
        self.guidance_scale, self.micro_batch_size, self.impl = guidance_scale, micro_batch_size, impl
        family = backbone.family
        self._precision = torch.float64 if family.dtype == torch.float64 else torch.float32
        self._tables = schedule.to(family.device, self._precision)
        self._lookahead = self._lookahead_tables().to(family.device, self._precision)
        self._beta = temperature(objective.alpha, objective.kl_scale, math.prod(family.latent_shape))

    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        """Backward through the whole batch; gradients are added to what the parameters' ``grad`` holds.

        Args:
            batch: states drawn from the replay buffer; seeds: [B] int64, the noise of x_{t-1}.

        Raises:
            UserError: the reward returned something that is no reward (then gradients are incomplete: discard them).
        """
        losses, rewards, kls = [], [], []
        for start in range(0, len(batch.index), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            reward, kl = self._forward(batch.x[part], batch.index[part], batch.prompts[part], seeds[part])
            loss = self._loss(reward, kl, batch.index[part], denominator=len(batch.index))
            loss.backward()
            losses.append(loss.item())
            rewards.append(reward.detach())
            kls.append(kl.detach())
        return StepResult(sum(losses), torch.cat(rewards), torch.cat(kls), batch.index)

    def _forward(self, x: Tensor, index: Tensor, prompts: Sequence[str], seeds: Tensor) -> tuple[Tensor, Tensor]:
        family = self.backbone.family
        x, index, seeds = x.to(family.device, self._precision), index.to(family.device), seeds.to(family.device)
        conditioning = family.encode(prompts)
        unconditional = family.encode([""]) if self.guidance_scale != 1 else None
        timesteps = self._tables.timesteps[index]
        with torch.no_grad(), self.backbone.role("reference"):
            reference = self.backbone.predict(x, timesteps, conditioning, unconditional)
        with self.backbone.role("policy"):
            policy = self.backbone.predict(x, timesteps, conditioning, unconditional)
        x_prev, kl = denoise_step(
            x,
            policy,
            reference,
            self._tables.transition,
            index,
            guidance_scale=self.guidance_scale,
            seed=seeds,
            kl_scale=self.objective.kl_scale,
            impl=self.impl,
        )
        x0_hat = self._look_ahead(x_prev, index, conditioning)
        return self.reward(family.decode(x0_hat.to(family.dtype)), prompts), kl

    def _loss(self, reward: Tensor, kl: Tensor, index: Tensor, denominator: int) -> Tensor:
        objective = self.objective
        index = index.to(reward.device)
        gamma = objective.gamma
        if objective.credit == "posterior":
            reward = reward * credit_weight(self.schedule, index, "posterior", beta=self._beta).to(reward)
            gamma = 1.0
        return discounted_loss(
            reward,
            kl,
            self.schedule.remaining(index),
            gamma=gamma,
            alpha=objective.alpha,
            mask_nonpositive=objective.mask_nonpositive,
            denominator=denominator,
            impl=self.impl,
        )

    def _look_ahead(self, x: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        # x_prev of the last index is x_0 itself: no network call for those samples.
        ahead = torch.nonzero(index < len(self.schedule.timesteps) - 1, as_tuple=True)[0]
        if len(ahead) == 0:
            return x
        estimate, index, conditioning = x[ahead], index[ahead], conditioning[ahead]
        role: Role = "consistency" if self.objective.lookahead == "consistency" else "reference"
        # A consistency model is distilled with its guidance: the conditional branch is all it has.
        scale = 1.0 if role == "consistency" else self.guidance_scale
        unconditional = self.backbone.family.encode([""]) if scale != 1 else None
        with self.backbone.role(role):
            for rows, timesteps in zip(self._lookahead.rows.unbind(1), self._lookahead.timesteps.unbind(1), strict=True):
                m = self.backbone.predict(estimate, timesteps[index], conditioning, unconditional)
                estimate = posterior_mean(
                    estimate, m, rows, index, guidance_scale=scale, out_dtype=x.dtype, impl=self.impl
                )
        return estimate if len(ahead) == len(x) else x.index_copy(0, ahead, estimate)

    def _lookahead_tables(self) -> Lookahead:
        objective = self.objective
        if objective.lookahead == "consistency":
            return self.schedule.consistency(snap=objective.consistency_grid)
        if objective.lookahead == "deterministic":
            return self.schedule.deterministic(objective.lookahead_steps)
        return self.schedule.tweedie()
