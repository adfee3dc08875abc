"""The staged executor: one vector-Jacobian product at a time, a few network rows or images at a time.

The chain x_t -> policy -> x_{t-1} -> look-ahead -> x0_hat -> picture -> reward is first run without a graph. Then
each link builds its own graph, is pulled back and freed, from the reward to the policy. What lives between the stages
are latents; the peak is that of the largest stage and does not grow with the batch. Policy and look-ahead run forward
twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqdf_fast.backbone import Rows
from sqdf_fast.engine.executor import Executor, StepResult, decoded_reward
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.kernels import denoise_step_staged, denoise_step_vjp, posterior_mean, posterior_mean_vjp
from sqdf_fast.objective import credited_loss, temperature
from sqdf_fast.replay import ReplayBatch

STAGES = ("transition", "look-ahead", "reward", "look-ahead vjp", "policy vjp")


@dataclass(frozen=True)
class _Call:
    """One network call on S samples of the batch, its rows made chunk by chunk.

    Attributes:
        prompts: of the S samples; timesteps: [S].
        halves: 2 with guidance, [unconditional; conditional], else 1.
    """

    prompts: list[str]
    timesteps: Tensor
    halves: int

    def parts(self, rows: int) -> Iterator[RowSlice]:
        """All of it, at most ``rows`` rows at a time; both halves of a sample together where two fit, as in joint."""
        together = min(rows, self.halves)
        size = rows // together
        for start in range(0, len(self.prompts), size):
            for half in range(0, self.halves, together):
                yield RowSlice(slice(half, half + together), slice(start, start + size))

    def by_half(self, rows: Tensor) -> Tensor:
        """[halves S, ...] as [halves, S, ...]."""
        return rows.unflatten(0, (self.halves, len(self.prompts)))


@dataclass(frozen=True)
class RowSlice:
    """Which halves of which of a call's samples; its rows are [halves samples, ...]."""

    halves: slice
    samples: slice

    def of(self, rows: Tensor) -> Tensor:
        """[halves, S, ...] to the part's rows."""
        return rows[self.halves, self.samples].flatten(0, 1)


@dataclass
class _Step:
    """What one step carries from stage to stage: latents and numbers, no graph."""

    batch: ReplayBatch
    x: Tensor
    index: Tensor
    seeds: Tensor
    ahead: list[int]
    states: list[Tensor] = field(default_factory=list)  # of the samples that look ahead: x_prev, then every estimate


class StagedExecutor(Executor):
    """Each stage's graph is freed before the next one's is built."""

    @normalize_oom_errors()
    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        device = self.backbone.family.device
        step = _Step(
            batch,
            batch.x.to(device, self.precision),
            batch.index.to(device),
            seeds.to(device),
            self.ahead(batch.index),
        )
        x_prev, kl, delta = self._transition(step)
        x0_hat = self._look_ahead(step, x_prev)
        reward, slope = self._reward(step, x0_hat)
        del x0_hat
        loss, grad_reward, grad_kl = self._loss(step, reward, kl)
        grad_x0 = slope.mul_(grad_reward.reshape(-1, *(1,) * (slope.ndim - 1)))
        grad_x_prev = self._look_ahead_vjp(step, grad_x0)
        self._policy_vjp(step, grad_x_prev, grad_kl, delta)
        return StepResult(loss, reward, kl, batch.index)

    @torch.no_grad()
    def _transition(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        self.begin("transition", "network")
        call = self._call(step.batch.prompts, self.tables.timesteps[step.index], self.guidance_scale)
        with self.backbone.role("reference"):
            reference = self._outputs(call, step.x)
        with self.backbone.role("policy"):
            policy = self._outputs(call, step.x)
        return denoise_step_staged(
            step.x,
            policy,
            reference,
            self.tables.transition,
            step.index,
            guidance_scale=self.guidance_scale,
            seed=step.seeds,
            kl_scale=self.objective.kl_scale,
            impl=self.impl,
        )

    @torch.no_grad()
    def _look_ahead(self, step: _Step, x_prev: Tensor) -> Tensor:
        self.begin("look-ahead", "network")
        if not step.ahead:
            return x_prev
        rows = torch.tensor(step.ahead, device=x_prev.device)
        index = step.index[rows]
        step.states.append(x_prev[rows])
        family = self.backbone.family
        # In full precision a merged LoRA is the LoRA up to the last bits, and saves its operators; in half it is not.
        exact = family.dtype == family.precision
        role = self.lookahead_role
        with self.backbone.merged(role, by_layer=True) if exact else self.backbone.role(role):
            for number in range(self.lookahead.calls):
                output = self._outputs(self._look_ahead_call(step, index, number), step.states[-1])
                estimate = posterior_mean(
                    step.states[-1],
                    output,
                    self.lookahead.rows[:, number],
                    index,
                    guidance_scale=self.lookahead_scale,
                    impl=self.impl,
                )
                step.states.append(estimate)
        estimate = step.states.pop()
        return estimate if len(step.ahead) == len(x_prev) else x_prev.index_copy(0, rows, estimate)

    def _reward(self, step: _Step, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [B], and d reward / d x0_hat [B, ...]."""
        self.begin("reward", "decoder", "reward")
        size = self.execution.decode_images
        rewards, slopes = [], []
        for start in range(0, len(x0_hat), size):
            part = slice(start, start + size)
            reward, slope = self._scored(x0_hat[part], step.batch.prompts[part])
            rewards.append(reward)
            slopes.append(slope)
        return torch.cat(rewards), torch.cat(slopes)

    def _scored(self, x0_hat: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        family = self.backbone.family
        latents = x0_hat.to(family.dtype, copy=True).requires_grad_(True)
        reward = decoded_reward(family, self.reward, latents, prompts)
        (slope,) = torch.autograd.grad(reward.sum(), latents)
        return reward.detach(), slope.to(self.precision)

    def _loss(self, step: _Step, reward: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, d loss / d reward and d loss / d kl."""
        objective = self.objective
        reward, kl = reward.detach().requires_grad_(True), kl.detach().requires_grad_(True)
        loss = credited_loss(
            reward,
            kl,
            self.schedule,
            step.index,
            alpha=objective.alpha,
            gamma=objective.gamma,
            beta=temperature(objective.alpha, objective.kl_scale, step.x[0].numel()),
            credit=objective.credit,
            mask_nonpositive=objective.mask_nonpositive,
            impl=self.impl,
        )
        grad_reward, grad_kl = torch.autograd.grad(loss, (reward, kl))
        return loss.detach(), grad_reward, grad_kl

    def _look_ahead_vjp(self, step: _Step, grad_x0: Tensor) -> Tensor:
        self.begin("look-ahead vjp", "network")
        if not step.ahead:
            return grad_x0
        rows = torch.tensor(step.ahead, device=grad_x0.device)
        index, grad = step.index[rows], grad_x0[rows]
        with self.backbone.role(self.lookahead_role):
            for number in reversed(range(self.lookahead.calls)):
                grad, grad_output = posterior_mean_vjp(
                    grad,
                    self.lookahead.rows[:, number],
                    index,
                    guidance_scale=self.lookahead_scale,
                    impl=self.impl,
                )
                x, call = step.states.pop(), self._look_ahead_call(step, index, number)
                grad_output = call.by_half(grad_output)
                for part in call.parts(self.execution.backward_batch_rows):
                    pulled = self._pulled_back(self._rows(call, part, x), part.of(grad_output))
                    grad[part.samples] += pulled.unflatten(0, (-1, len(grad[part.samples]))).sum(0)
        return grad if len(step.ahead) == len(grad_x0) else grad_x0.index_copy_(0, rows, grad)

    def _pulled_back(self, rows: Rows, grad: Tensor) -> Tensor:
        x = rows.x.detach().requires_grad_(True)
        output = self.backbone.run(rows.at(x))
        # Not autograd.grad: counters that hook modules cannot follow it to a leaf. Nothing else here has a gradient.
        output.backward(grad.to(output.dtype))
        assert x.grad is not None
        return x.grad

    def _policy_vjp(self, step: _Step, grad_x_prev: Tensor, grad_kl: Tensor, delta: Tensor) -> None:
        self.begin("policy vjp", *self.groups.of_role("policy"))
        grad = denoise_step_vjp(
            grad_x_prev,
            grad_kl,
            delta,
            self.tables.transition,
            step.index,
            guidance_scale=self.guidance_scale,
            kl_scale=self.objective.kl_scale,
            impl=self.impl,
        )
        call = self._call(step.batch.prompts, self.tables.timesteps[step.index], self.guidance_scale)
        grad = call.by_half(grad)
        with self.backbone.role("policy"):
            for part in call.parts(self.execution.backward_batch_rows):
                output = self.backbone.run(self._rows(call, part, step.x))
                output.backward(part.of(grad).to(output.dtype))
                del output  # or its graph lives until the next one is whole

    def _call(self, prompts: list[str], timesteps: Tensor, scale: float) -> _Call:
        """The rows of samples with these prompts; timesteps: [S]."""
        return _Call(prompts, timesteps, 1 if scale == 1 else 2)

    def _look_ahead_call(self, step: _Step, index: Tensor, number: int) -> _Call:
        prompts = [step.batch.prompts[i] for i in step.ahead]
        return self._call(prompts, self.lookahead.timesteps[:, number][index], self.lookahead_scale)

    @torch.no_grad()
    def _outputs(self, call: _Call, x: Tensor) -> Tensor:
        """The network's outputs on all rows, [halves S, ...]."""
        outputs = None
        for part in call.parts(self.execution.forward_batch_rows):
            found = self.backbone.run(self._rows(call, part, x))
            if outputs is None:
                outputs = call.by_half(found.new_empty(call.halves * len(x), *found.shape[1:]))
            place = outputs[part.halves, part.samples]
            place.copy_(found.unflatten(0, place.shape[:2]))
        assert outputs is not None
        return outputs.flatten(0, 1)

    def _rows(self, call: _Call, part: RowSlice, x: Tensor) -> Rows:
        samples, timesteps = x[part.samples], call.timesteps[part.samples]
        halves = range(call.halves)[part.halves]
        given = call.prompts[part.samples]
        prompts = [prompt for half in halves for prompt in (given if half == call.halves - 1 else [""] * len(given))]
        both = torch.cat([samples] * len(halves)), torch.cat([timesteps] * len(halves))
        return Rows(*both, self.backbone.family.encode(prompts))
