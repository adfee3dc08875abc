"""The staged executor: one vector-Jacobian product at a time, a few network rows or images at a time.

The chain x_t -> policy -> x_{t-1} -> look-ahead -> x0_hat -> image -> reward first runs without a graph. Then each link
builds its own graph, takes its vector-Jacobian product and frees it, from the reward back to the policy. Only latents
are kept between the stages: peak memory is that of the largest stage and does not grow with the batch. Policy and
look-ahead run forward twice.
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
class RowSlice:
    """Some halves of some samples of a network call, as rows [halves samples, ...]."""

    halves: slice
    samples: slice

    def of(self, rows: Tensor) -> Tensor:
        """[halves, S, ...] to the slice's rows."""
        return rows[self.halves, self.samples].flatten(0, 1)


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

    def slices(self, rows: int) -> Iterator[RowSlice]:
        """All of it, at most ``rows`` rows at a time; both halves of a sample together where two fit, as in joint."""
        together = min(rows, self.halves)
        size = rows // together
        for start in range(0, len(self.prompts), size):
            for half in range(0, self.halves, together):
                yield RowSlice(slice(half, half + together), slice(start, start + size))

    def by_half(self, rows: Tensor) -> Tensor:
        """[halves S, ...] as [halves, S, ...]."""
        return rows.unflatten(0, (self.halves, len(self.prompts)))


@dataclass
class _Step:
    """What one step carries from stage to stage: latents and numbers, no graph."""

    prompts: list[str]
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
        x, index = batch.x.to(device, self.precision), batch.index.to(device)
        step = _Step(batch.prompts, x, index, seeds.to(device), self.ahead(batch.index))
        # Forward, without a graph: x_{t-1} from the policy, KL to the reference, x0_hat.
        x_prev, kl, delta = self._transition(step)
        x0_hat = self._look_ahead(step, x_prev)
        # Backward: d reward / d x0_hat, then through the look-ahead to x_{t-1}, then through the policy.
        reward, grad_x0 = self._reward(step, x0_hat)
        del x0_hat
        loss, grad_reward, grad_kl = self._loss(step, reward, kl)
        grad_x0.mul_(grad_reward.reshape(-1, *(1,) * (grad_x0.ndim - 1)))
        grad_x_prev = self._look_ahead_vjp(step, grad_x0)
        self._policy_vjp(step, grad_x_prev, grad_kl, delta)
        return StepResult(loss, reward, kl, batch.index)

    @torch.no_grad()
    def _transition(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """x_{t-1} [B, ...], KL [B], and what the backward pass needs."""
        self.begin("transition", "network")
        call = self._policy_call(step)
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
        """x0_hat [B, ...]."""
        self.begin("look-ahead", "network")
        if not step.ahead:
            return x_prev
        rows = torch.tensor(step.ahead, device=x_prev.device)
        index, estimate = step.index[rows], x_prev[rows]
        family, role, scale = self.backbone.family, self.lookahead_role, self.lookahead_scale
        # In full precision merging changes the last bits only, and saves the LoRA's operators; in half it changes more.
        exact = family.dtype == family.precision
        with self.backbone.merged(role, by_layer=True) if exact else self.backbone.role(role):
            for number in range(self.lookahead.calls):
                step.states.append(estimate)
                output = self._outputs(self._look_ahead_call(step, index, number), estimate)
                table = self.lookahead.rows[:, number]
                estimate = posterior_mean(estimate, output, table, index, guidance_scale=scale, impl=self.impl)
        return estimate if len(step.ahead) == len(x_prev) else x_prev.index_copy(0, rows, estimate)

    def _reward(self, step: _Step, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [B], and d reward / d x0_hat [B, ...]."""
        self.begin("reward", "decoder", "reward")
        family, size = self.backbone.family, self.execution.decode_images
        rewards, slopes = [], []
        for start in range(0, len(x0_hat), size):
            part = slice(start, start + size)
            latents = x0_hat[part].to(family.dtype, copy=True).requires_grad_(True)
            reward = decoded_reward(family, self.reward, latents, step.prompts[part])
            (slope,) = torch.autograd.grad(reward.sum(), latents)
            rewards.append(reward.detach())
            slopes.append(slope.to(self.precision))
            del reward  # or its graph lives until the next one is complete
        return torch.cat(rewards), torch.cat(slopes)

    def _loss(self, step: _Step, reward: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, d loss / d reward and d loss / d kl."""
        reward, kl = reward.detach().requires_grad_(True), kl.detach().requires_grad_(True)
        beta = temperature(self.objective.alpha, self.objective.kl_scale, step.x[0].numel())
        settings = self.objective.loss_settings
        loss = credited_loss(reward, kl, self.schedule, step.index, beta=beta, impl=self.impl, **settings)
        grad_reward, grad_kl = torch.autograd.grad(loss, (reward, kl))
        return loss.detach(), grad_reward, grad_kl

    def _look_ahead_vjp(self, step: _Step, grad_x0: Tensor) -> Tensor:
        """d loss / d x_{t-1} through the look-ahead, [B, ...]."""
        self.begin("look-ahead vjp", "network")
        if not step.ahead:
            return grad_x0
        rows = torch.tensor(step.ahead, device=grad_x0.device)
        index, grad = step.index[rows], grad_x0[rows]
        with self.backbone.role(self.lookahead_role):
            for number in reversed(range(self.lookahead.calls)):
                table, scale = self.lookahead.rows[:, number], self.lookahead_scale
                grad, grad_output = posterior_mean_vjp(grad, table, index, guidance_scale=scale, impl=self.impl)
                state, call = step.states.pop(), self._look_ahead_call(step, index, number)
                grad_output = call.by_half(grad_output)
                for part in call.slices(self.execution.backward_batch_rows):
                    chunk = self._rows(call, part, state)
                    x = chunk.x.detach().requires_grad_(True)
                    output = self.backbone.run(chunk.at(x))
                    # Not autograd.grad: counters that hook modules cannot follow it to a leaf. x alone has a gradient.
                    output.backward(part.of(grad_output).to(output.dtype))
                    assert x.grad is not None
                    grad[part.samples] += x.grad.unflatten(0, (-1, len(grad[part.samples]))).sum(0)
                    del output
        return grad if len(step.ahead) == len(grad_x0) else grad_x0.index_copy_(0, rows, grad)

    def _policy_vjp(self, step: _Step, grad_x_prev: Tensor, grad_kl: Tensor, delta: Tensor) -> None:
        """Add the policy's gradients to its parameters."""
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
        call = self._policy_call(step)
        grad = call.by_half(grad)
        with self.backbone.role("policy"):
            for part in call.slices(self.execution.backward_batch_rows):
                output = self.backbone.run(self._rows(call, part, step.x))
                output.backward(part.of(grad).to(output.dtype))
                del output  # or its graph lives until the next one is complete

    def _policy_call(self, step: _Step) -> _Call:
        return _Call(step.prompts, self.tables.timesteps[step.index], 1 if self.guidance_scale == 1 else 2)

    def _look_ahead_call(self, step: _Step, index: Tensor, number: int) -> _Call:
        prompts = [step.prompts[i] for i in step.ahead]
        return _Call(prompts, self.lookahead.timesteps[:, number][index], 1 if self.lookahead_scale == 1 else 2)

    @torch.no_grad()
    def _outputs(self, call: _Call, x: Tensor) -> Tensor:
        """The network's outputs on all rows, [halves S, ...]."""
        outputs = None
        for part in call.slices(self.execution.forward_batch_rows):
            chunk = self.backbone.run(self._rows(call, part, x))
            if outputs is None:
                outputs = call.by_half(chunk.new_empty(call.halves * len(x), *chunk.shape[1:]))
            target = outputs[part.halves, part.samples]
            target.copy_(chunk.unflatten(0, target.shape[:2]))
        assert outputs is not None
        return outputs.flatten(0, 1)

    def _rows(self, call: _Call, part: RowSlice, x: Tensor) -> Rows:
        samples, timesteps = x[part.samples], call.timesteps[part.samples]
        halves = range(call.halves)[part.halves]
        given = call.prompts[part.samples]
        prompts = [prompt for half in halves for prompt in (given if half == call.halves - 1 else [""] * len(given))]
        both = torch.cat([samples] * len(halves)), torch.cat([timesteps] * len(halves))
        return Rows(*both, self.backbone.family.encode(prompts))
