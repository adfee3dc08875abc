"""The joint executor: policy, look-ahead, decode and reward in one autograd graph, micro-batch by micro-batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sqdf_fast.engine.executor import Executor, StepResult, decoded_reward
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.families import Conditioning
from sqdf_fast.objective import SqdfLoss, look_ahead, sqdf_loss
from sqdf_fast.replay import ReplayBatch


class JointExecutor(Executor):
    """One graph per micro-batch: the fewest network evaluations, and memory for all stages at once."""

    @normalize_oom_errors()
    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        losses, rewards, kls = [], [], []
        size = self.execution.micro_batch
        for start in range(0, len(batch.prompts), size):
            self.begin("forward", *ALL_GROUPS)
            result = self._loss(batch, seeds, slice(start, start + size))
            self.begin("backward", *ALL_GROUPS)
            result.loss.backward()
            losses.append(result.loss.detach())
            rewards.append(result.reward)
            kls.append(result.kl)
        return StepResult(torch.stack(losses).sum(), torch.cat(rewards), torch.cat(kls), batch.index)

    def _loss(self, batch: ReplayBatch, seeds: Tensor, part: slice) -> SqdfLoss:
        family, device, prompts = self.backbone.family, self.backbone.family.device, batch.prompts[part]
        ahead = self.ahead(batch.index[part])
        x, index = batch.x[part].to(device, self.precision), batch.index[part].to(device)
        conditioning, unconditional = family.encode(prompts), family.unconditional(self.guidance_scale)
        timesteps = self.tables.timesteps[index]
        with torch.no_grad(), self.backbone.role("reference"):
            reference = self.backbone.predict(x, timesteps, conditioning, unconditional)
        with self.backbone.role("policy"):
            policy = self.backbone.predict(x, timesteps, conditioning, unconditional)

        def score(x_prev: Tensor) -> Tensor:
            return decoded_reward(family, self.reward, self._look_ahead(x_prev, index, ahead, conditioning), prompts)

        return sqdf_loss(
            x,
            policy,
            reference,
            self.schedule,
            index,
            score,
            **self.objective.loss_settings,
            kl_scale=self.objective.kl_scale,
            guidance_scale=self.guidance_scale,
            seed=seeds[part].to(device),
            denominator=len(batch.prompts),
            impl=self.impl,
        )

    def _look_ahead(self, x_prev: Tensor, index: Tensor, ahead: list[int], conditioning: Conditioning) -> Tensor:
        if not ahead:
            return x_prev
        rows, scale = torch.tensor(ahead, device=x_prev.device), self.lookahead_scale
        unconditional = self.backbone.family.unconditional(scale)
        network = partial(self.backbone.predict, conditioning=conditioning[rows], unconditional=unconditional)
        with self.backbone.role(self.lookahead_role):
            estimate = look_ahead(
                x_prev[rows], index[rows], self.lookahead, network, guidance_scale=scale, impl=self.impl
            )
        return estimate if len(ahead) == len(x_prev) else x_prev.index_copy(0, rows, estimate)
