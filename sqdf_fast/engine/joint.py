"""The joint executor: policy, look-ahead, decode and reward in one autograd graph, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
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
    """One graph a micro-batch: the fewest network evaluations, and memory for all stages at once."""

    @normalize_oom_errors()
    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        losses, rewards, kls = [], [], []
        size = self.execution.micro_batch
        for start in range(0, len(batch.prompts), size):
            part = slice(start, start + size)
            self.begin("forward", *ALL_GROUPS)
            found = self._loss(batch.x[part], batch.index[part], batch.prompts[part], seeds[part], len(batch.prompts))
            self.begin("backward", *ALL_GROUPS)
            found.loss.backward()
            losses.append(found.loss.detach())
            rewards.append(found.reward)
            kls.append(found.kl)
        return StepResult(torch.stack(losses).sum(), torch.cat(rewards), torch.cat(kls), batch.index)

    def _loss(self, x: Tensor, index: Tensor, prompts: Sequence[str], seeds: Tensor, denominator: int) -> SqdfLoss:
        family, objective = self.backbone.family, self.objective
        ahead = self.ahead(index)
        x, index = x.to(family.device, self.precision), index.to(family.device)
        conditioning = family.encode(prompts)
        unconditional = family.unconditional(self.guidance_scale)
        timesteps = self.tables.timesteps[index]
        with torch.no_grad(), self.backbone.role("reference"):
            reference = self.backbone.predict(x, timesteps, conditioning, unconditional)
        with self.backbone.role("policy"):
            policy = self.backbone.predict(x, timesteps, conditioning, unconditional)

        def score(x_prev: Tensor) -> Tensor:
            x0_hat = self._look_ahead(x_prev, index, ahead, conditioning)
            return decoded_reward(family, self.reward, x0_hat, prompts)

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

    def _look_ahead(self, x_prev: Tensor, index: Tensor, ahead: list[int], conditioning: Conditioning) -> Tensor:
        if not ahead:
            return x_prev
        rows = torch.tensor(ahead, device=x_prev.device)
        scale = self.lookahead_scale
        unconditional = self.backbone.family.unconditional(scale)
        with self.backbone.role(self.lookahead_role):
            estimate = look_ahead(
                x_prev[rows],
                index[rows],
                self.lookahead,
                partial(self.backbone.predict, conditioning=conditioning[rows], unconditional=unconditional),
                guidance_scale=scale,
                impl=self.impl,
            )
        return estimate if len(ahead) == len(x_prev) else x_prev.index_copy(0, rows, estimate)
