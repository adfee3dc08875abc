"""The joint executor: policy, look-ahead, decode and reward in one autograd graph, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Objective
from sqdf_fast.families import Conditioning
from sqdf_fast.objective import SqdfLoss, look_ahead, sqdf_loss
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
        self._precision = family.precision
        self._timesteps = schedule.timesteps.to(family.device, self._precision)
        self._lookahead = self._lookahead_tables().to(family.device, self._precision)

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
            found = self._loss(batch.x[part], batch.index[part], batch.prompts[part], seeds[part], len(batch.index))
            found.loss.backward()
            losses.append(found.loss.item())
            rewards.append(found.reward)
            kls.append(found.kl)
        return StepResult(sum(losses), torch.cat(rewards), torch.cat(kls), batch.index)

    def _loss(self, x: Tensor, index: Tensor, prompts: Sequence[str], seeds: Tensor, denominator: int) -> SqdfLoss:
        family, objective = self.backbone.family, self.objective
        x, index = x.to(family.device, self._precision), index.to(family.device)
        conditioning = family.encode(prompts)
        unconditional = family.encode([""]) if self.guidance_scale != 1 else None
        timesteps = self._timesteps[index]
        with torch.no_grad(), self.backbone.role("reference"):
            reference = self.backbone.predict(x, timesteps, conditioning, unconditional)
        with self.backbone.role("policy"):
            policy = self.backbone.predict(x, timesteps, conditioning, unconditional)

        def score(x_prev: Tensor) -> Tensor:
            x0_hat = self._look_ahead(x_prev, index, conditioning)
            return self.reward(family.decode(x0_hat.to(family.dtype)), prompts)

        return sqdf_loss(
            x,
            policy,
            reference,
            self.schedule,
            index,
            score,
            alpha=objective.alpha,
            gamma=objective.gamma,
            guidance_scale=self.guidance_scale,
            seed=seeds.to(family.device),
            kl_scale=objective.kl_scale,
            credit=objective.credit,
            mask_nonpositive=objective.mask_nonpositive,
            denominator=denominator,
            impl=self.impl,
        )

    def _look_ahead(self, x_prev: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        # x_prev of the last index is x_0 itself: no network call for those samples.
        ahead = torch.nonzero(index < len(self.schedule) - 1, as_tuple=True)[0]
        if len(ahead) == 0:
            return x_prev
        role: Role = "consistency" if self.objective.lookahead == "consistency" else "reference"
        # A consistency model is distilled with its guidance: the conditional branch is all it has.
        scale = 1.0 if role == "consistency" else self.guidance_scale
        unconditional = self.backbone.family.encode([""]) if scale != 1 else None
        conditioning = conditioning[ahead]
        with self.backbone.role(role):
            estimate = look_ahead(
                x_prev[ahead],
                index[ahead],
                self._lookahead,
                partial(self.backbone.predict, conditioning=conditioning, unconditional=unconditional),
                guidance_scale=scale,
                impl=self.impl,
            )
        return estimate if len(ahead) == len(x_prev) else x_prev.index_copy(0, ahead, estimate)

    def _lookahead_tables(self) -> Lookahead:
        objective = self.objective
        if objective.lookahead == "consistency":
            return self.schedule.consistency(snap=objective.consistency_grid)
        if objective.lookahead == "deterministic":
            return self.schedule.deterministic(objective.lookahead_steps)
        return self.schedule.tweedie()
