"""Better images without training: the best of N, or the reward's gradient in every denoising step.

Both spend at sampling what fine-tuning spends once, so both say what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sqdf_fast.backbone import Role
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.engine.sampler import Step
from sqdf_fast.errors import UserError
from sqdf_fast.kernels import posterior_mean
from sqdf_fast.kernels.philox import derive_seeds
from sqdf_fast.schedule import DenoisingSchedule, consistency_rows

Method = Literal["best-of-n", "guided"]
Estimate = Literal["tweedie", "consistency"]


@dataclass(frozen=True)
class Cost:
    """What a way of sampling has spent.

    Attributes:
        unet_evaluations: rows that went through the network; a guided sample has two a step.
        unet_backward_rows: those of them with a backward pass, each about twice as much work again.
        reward_evaluations: images decoded and scored; reward_backward_images: those of them with a backward pass.
    """

    unet_evaluations: int = 0
    unet_backward_rows: int = 0
    reward_evaluations: int = 0
    reward_backward_images: int = 0


@dataclass(frozen=True)
class TrainingFree:
    """Latents x_0 [n, ...] in the family's precision, one for each prompt, and what they cost."""

    x0: Tensor
    cost: Cost


def training_free(
    method: Method,
    runtime: Runtime,
    prompts: Sequence[str],
    seeds: Tensor,
    *,
    role: Role = "reference",
    candidates: int = 8,
    scale: float = 1.0,
    estimate: Estimate = "tweedie",
) -> TrainingFree:
    """One sample for each prompt, better by the runtime's reward than the sampler's own; nothing is trained.

    "best-of-n" samples ``candidates`` times and keeps the image of the highest reward. The first candidate is what
    the sampler draws from the seeds, so that one candidate is plain sampling, and more are never worse.

    "guided" adds scale times the gradient of r(x0_hat(x_t)) to the score of every step, see :func:`score_shift`:
    universal guidance (Bansal et al., arXiv 2302.07121, forward guidance, one pass a step) with the reward as minus
    its loss. At scale 0 it is plain sampling; 1 / scale is the temperature of the tilt that it approximates.

    Args:
        runtime: the model, how it samples, and the reward; differentiable for "guided".
        prompts: n prompts; seeds: [n] int64, one a sample.
        role: whose samples are improved: "reference" or "policy".
        candidates: N of "best-of-n"; scale, estimate: of "guided".
        estimate: x0_hat(x_t), by Tweedie's formula through the network itself, or by the consistency model, which is
            one more network call a step and the only one that the gradient goes through.

    Raises:
        UserError: candidates < 1, a negative scale, an unknown method or estimate, no consistency model, a reward
            without a gradient, or not even one image fits the memory; Interrupted.
    """
    if method == "best-of-n":
        if candidates < 1:
            raise UserError(f"best of {candidates}: give at least 1 candidate")
        return _best_of(runtime, prompts, seeds, role, candidates)
    if method != "guided" or estimate not in ("tweedie", "consistency"):
        raise UserError(
            f"method={method!r}, estimate={estimate!r}: allowed are best-of-n and guided, tweedie and consistency"
        )
    if not scale >= 0:
        raise UserError(f"guidance by the reward at scale {scale}: give a number >= 0")
    guidance = _Guidance(runtime, role, scale, estimate)
    return runtime.retry(lambda: guidance.sample(prompts, seeds), lambda: runtime.fewer_samples("sampling"))


def score_shift(schedule: DenoisingSchedule) -> Tensor:
    """How far a step's mean moves when g is added to the score at x_t: mean + shift g. [T] float64.

    A score that is larger by g is an epsilon_hat smaller by noise g and an x0_hat larger by noise^2 / signal g. Since
    x0_hat = a x + b m, the network's output moves by noise^2 / (signal b) g and the mean by q times that, whatever
    the network predicts. 0 at pure noise, whose score does not depend on x_0.
    """
    signal, noise = schedule.levels.unbind(1)
    shift = schedule.transition[:, 1] * noise.square() / (signal * schedule.posterior[:, 1])
    return torch.where(signal == 0, torch.zeros_like(shift), shift)


def _best_of(runtime: Runtime, prompts: Sequence[str], seeds: Tensor, role: Role, candidates: int) -> TrainingFree:
    evaluations, scored = runtime.backbone.evaluations, runtime.reward_evaluations
    for number in range(candidates):
        own = seeds if number == 0 else derive_seeds(Stream.CANDIDATE, number, ids=seeds)
        x0 = runtime.sample(prompts, own, f"candidate {number + 1} of {candidates}", role=role).x0
        reward = runtime.rewards(x0, prompts)
        if number == 0:
            best, best_reward = x0, reward
        better = reward > best_reward
        best_reward = torch.where(better, reward, best_reward)
        best = torch.where(better.view(-1, *(1,) * (x0.ndim - 1)), x0, best)
    spent = Cost(runtime.backbone.evaluations - evaluations, 0, runtime.reward_evaluations - scored)
    return TrainingFree(best, spent)


class _Guidance:
    """Guided sampling, a batch of the sampler's at a time; counts its backward passes."""

    def __init__(self, runtime: Runtime, role: Role, scale: float, estimate: Estimate) -> None:
        if estimate == "consistency" and not runtime.backbone.has_consistency:
            raise UserError("this model has no consistency LoRA for guidance; estimate x_0 by tweedie")
        self.runtime, self.role, self.estimate = runtime, role, estimate
        self.backbone, self.family, self.sampler = runtime.backbone, runtime.family, runtime.sampler
        schedule = self.sampler.schedule
        self.shifts: list[float] = (scale * score_shift(schedule)).tolist()
        rows = schedule.posterior
        if estimate == "consistency":
            rows = consistency_rows(rows, schedule.timesteps)
        self.rows = rows.to(self.family.device, self.family.precision)

    def sample(self, prompts: Sequence[str], seeds: Tensor) -> TrainingFree:
        runtime, size, steps = self.runtime, self.sampler.batch_size, len(self.sampler.schedule)
        evaluations, scored = self.backbone.evaluations, runtime.reward_evaluations
        self.unet_backward_rows = self.reward_backward_images = 0
        runtime.begin("guided sampling", *ALL_GROUPS)
        starts, samples = range(0, len(prompts), size), []
        for number, start in enumerate(starts):
            part = slice(start, start + size)
            transition = partial(self._transition, prompts=list(prompts[part]))
            for i, x in enumerate(self.sampler.walk(prompts[part], seeds[part], transition=transition)):
                runtime.check_stop()
                runtime.progress.phase("sampling", number * steps + i, len(starts) * steps)
                x0 = x
            samples.append(x0)
        spent = Cost(
            self.backbone.evaluations - evaluations,
            self.unet_backward_rows,
            runtime.reward_evaluations - scored,
            self.reward_backward_images,
        )
        return TrainingFree(torch.cat(samples), spent)

    def _transition(self, step: Step, prompts: list[str]) -> Tensor:
        return self.sampler.add_noise(self._guided_mean(step, prompts), step)

    def _guided_mean(self, step: Step, prompts: list[str]) -> Tensor:
        guided = self.shifts[step.i] != 0
        through = guided and self.estimate == "tweedie"
        with torch.set_grad_enabled(through):
            x = step.x.detach().requires_grad_(through)
            m = self._output(self.role, x, step, self.sampler.guidance_scale)
        with torch.no_grad():
            mean = self.sampler.mean(step, m)
        if not guided:
            return mean
        with torch.enable_grad():
            scale = self.sampler.guidance_scale
            if not through:
                # A consistency model is distilled with its guidance.
                x, scale = x.requires_grad_(True), 1.0
                m = self._output("consistency", x, step, scale)
            x0_hat = posterior_mean(x, m, self.rows, step.index, guidance_scale=scale, impl=self.sampler.impl)
            return mean + self.shifts[step.i] * self._gradient(x, x0_hat, prompts, len(m))

    def _gradient(self, x: Tensor, x0_hat: Tensor, prompts: list[str], rows: int) -> Tensor:
        """Of every sample's own reward at x_t."""
        reward = self.runtime.score_latents(x0_hat, prompts)
        if not reward.requires_grad:
            raise UserError("this reward has no gradient to guide by; use best-of-n, which needs no gradient")
        self.unet_backward_rows += rows
        self.reward_backward_images += len(prompts)
        (gradient,) = torch.autograd.grad(reward.sum(), x)
        if not torch.isfinite(gradient).all():
            raise UserError("the reward's gradient is not finite; lower the guidance scale or repair its backward pass")
        return gradient

    def _output(self, role: Role, x: Tensor, step: Step, scale: float) -> Tensor:
        unconditional = None if scale == 1 else step.unconditional
        with self.backbone.role(role):
            return self.backbone.predict(x, self.sampler.tables.timesteps[step.index], step.conditioning, unconditional)
