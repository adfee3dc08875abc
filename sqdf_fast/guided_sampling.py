"""Better pictures without training: the best of N, or the reward's gradient in every denoising step.

Both spend at sampling what fine-tuning spends once, so both say what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.engine.executor import RewardFunction
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError
from sqdf_fast.kernels import philox_normal, posterior_mean
from sqdf_fast.kernels.philox import derive_seeds
from sqdf_fast.schedule import DenoisingSchedule, consistency_rows

Method = Literal["best-of-n", "guided"]
Estimate = Literal["tweedie", "consistency"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cost:
    """What a way of sampling has spent.

    Attributes:
        unet_evaluations: rows that went through the network; a guided sample has two a step.
        unet_pullbacks: rows among them that a gradient was pulled back through, each about twice as much work again.
        reward_evaluations: pictures decoded and scored.
        reward_pullbacks: those among them whose gradient was taken.
    """

    unet_evaluations: int = 0
    unet_pullbacks: int = 0
    reward_evaluations: int = 0
    reward_pullbacks: int = 0


@dataclass(frozen=True)
class TrainingFree:
    """Latents x_0 [n, ...] in the family's precision, one for each prompt, and what they cost."""

    x0: Tensor
    cost: Cost


def training_free(
    method: Method,
    backbone: Backbone,
    sampler: Sampler,
    reward: RewardFunction,
    prompts: Sequence[str],
    seeds: Tensor,
    *,
    role: Role = "reference",
    candidates: int = 8,
    scale: float = 1.0,
    estimate: Estimate = "tweedie",
    on_progress: Progress | None = None,
) -> TrainingFree:
    """One sample for each prompt, better by ``reward`` than the sampler's own; nothing is trained.

    "best-of-n" samples ``candidates`` times and keeps the picture of the highest reward. The first candidate is what
    the sampler draws from the seeds, so that one candidate is plain sampling, and more are never worse.

    "guided" adds scale times the gradient of r(x0_hat(x_t)) to the score of every step, see :func:`score_shift`:
    universal guidance (Bansal et al., arXiv 2302.07121, forward guidance, one pass a step) with the reward as minus
    its loss. At scale 0 it is plain sampling; 1 / scale is the temperature of the tilt that it approximates.

    Args:
        backbone, sampler: the model, and how it samples: its schedule, guidance scale and batch size, which is also
            how many pictures are scored at once.
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B]; differentiable for "guided".
        prompts: n prompts; seeds: [n] int64, one a sample.
        role: whose samples are to be bettered: "reference" or "policy".
        candidates: N of "best-of-n"; scale, estimate: of "guided".
        estimate: x0_hat(x_t), by Tweedie's formula through the network itself, or by the consistency model, which is
            one more network call a step and the only one that the gradient goes through.
        on_progress: called with (rounds of sampling, or guided steps, done; and in all).

    Raises:
        UserError: candidates < 1, a scale that is negative, an unknown method or estimate, no consistency model, or
            a reward without a gradient.
    """
    if method == "best-of-n":
        if candidates < 1:
            raise UserError(f"best of {candidates}: give at least 1 candidate")
        return _best_of(backbone, sampler, reward, prompts, seeds, role, candidates, on_progress)
    if method != "guided" or estimate not in ("tweedie", "consistency"):
        raise UserError(
            f"method={method!r}, estimate={estimate!r}: allowed are best-of-n and guided, tweedie and consistency"
        )
    if not scale >= 0:
        raise UserError(f"guidance by the reward at scale {scale}: give a number >= 0")
    return _Guidance(backbone, sampler, reward, role, scale, estimate).sample(prompts, seeds, on_progress)


def score_shift(schedule: DenoisingSchedule) -> Tensor:
    """How far a step's mean moves when g is added to the score at x_t: mean + shift g. [T] float64.

    A score that is larger by g is an epsilon_hat smaller by noise g and an x0_hat larger by noise^2 / signal g. Since
    x0_hat = a x + b m, the network's output moves by noise^2 / (signal b) g and the mean by q times that, whatever
    the network predicts. 0 at pure noise, whose score says nothing of x_0.
    """
    signal, noise = schedule.levels.unbind(1)
    shift = schedule.transition[:, 1] * noise.square() / (signal * schedule.posterior[:, 1])
    return torch.where(signal == 0, torch.zeros_like(shift), shift)


def _best_of(
    backbone: Backbone,
    sampler: Sampler,
    reward: RewardFunction,
    prompts: Sequence[str],
    seeds: Tensor,
    role: Role,
    candidates: int,
    on_progress: Progress | None,
) -> TrainingFree:
    before = backbone.evaluations
    best = best_reward = None
    for number in range(candidates):
        own = seeds if number == 0 else derive_seeds(Stream.CANDIDATE, number, ids=seeds)
        x0 = sampler.sample(prompts, own, role=role).x0
        found = _rewards(backbone, reward, x0, prompts, sampler.batch_size)
        if best is None or best_reward is None:
            best, best_reward = x0, found
        else:
            better = found > best_reward
            best_reward = torch.where(better, found, best_reward)
            best = torch.where(better.view(-1, *(1,) * (x0.ndim - 1)), x0, best)
        if on_progress:
            on_progress(number + 1, candidates)
    assert best is not None
    scored = candidates * len(prompts)
    return TrainingFree(best, Cost(backbone.evaluations - before, reward_evaluations=scored))


@torch.no_grad()
def _rewards(backbone: Backbone, reward: RewardFunction, latents: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    family = backbone.family
    parts = [
        reward(family.decode(latents[i : i + size].to(family.dtype)), prompts[i : i + size])
        for i in range(0, len(prompts), size)
    ]
    return torch.cat(parts)


class _Guidance:
    """Guided sampling, a batch of the sampler's at a time; counts what it pulls back."""

    def __init__(
        self,
        backbone: Backbone,
        sampler: Sampler,
        reward: RewardFunction,
        role: Role,
        scale: float,
        estimate: Estimate,
    ) -> None:
        if estimate == "consistency" and not backbone.has_consistency:
            raise UserError("this model has no consistency LoRA for guidance; estimate x_0 by tweedie")
        self.backbone, self.sampler, self.reward = backbone, sampler, reward
        self.role, self.scale, self.estimate = role, scale, estimate
        family, schedule = backbone.family, sampler.schedule
        self.tables = schedule.to(family.device, family.precision)
        self.sigmas: list[float] = schedule.transition[:, 2].tolist()
        self.shifts: list[float] = (scale * score_shift(schedule)).tolist()
        rows = schedule.posterior
        if estimate == "consistency":
            rows = consistency_rows(rows, schedule.timesteps)
        self.rows = rows.to(family.device, family.precision)
        self.unet_pullbacks = self.reward_pullbacks = 0

    def sample(self, prompts: Sequence[str], seeds: Tensor, on_progress: Progress | None) -> TrainingFree:
        before, steps, size = self.backbone.evaluations, len(self.sampler.schedule), self.sampler.batch_size
        starts, parts = range(0, len(prompts), size), []
        for number, start in enumerate(starts):

            def report(step: int, done: int = number * steps) -> None:
                if on_progress:
                    on_progress(done + step, len(starts) * steps)

            part = slice(start, start + size)
            parts.append(self._denoise(list(prompts[part]), seeds[part], report))
        evaluations = self.backbone.evaluations - before
        cost = Cost(evaluations, self.unet_pullbacks, self.reward_pullbacks, self.reward_pullbacks)
        return TrainingFree(torch.cat(parts), cost)

    def _denoise(self, prompts: list[str], seeds: Tensor, report: Callable[[int], None]) -> Tensor:
        x = self._noise(derive_seeds(Stream.INITIAL, ids=seeds))
        for i, sigma in enumerate(self.sigmas):
            index = torch.full((len(x),), i, device=x.device)
            mean = self._guided_mean(x, index, self.shifts[i], prompts)
            noise = self._noise(derive_seeds(Stream.DENOISING, i, ids=seeds)) if sigma else 0.0
            x = mean + sigma * noise
            report(i + 1)
        return x

    def _guided_mean(self, x: Tensor, index: Tensor, shift: float, prompts: list[str]) -> Tensor:
        guided = shift != 0
        through = guided and self.estimate == "tweedie"
        with torch.set_grad_enabled(through):
            x = x.detach().requires_grad_(through)
            m = self._output(self.role, x, index, prompts, self.sampler.guidance_scale)
        with torch.no_grad():
            mean = self._affine(x, m, self.tables.transition[:, :2], index, self.sampler.guidance_scale)
        if not guided:
            return mean
        with torch.enable_grad():
            scale = self.sampler.guidance_scale
            if not through:
                # A consistency model is distilled with its guidance.
                x, scale = x.requires_grad_(True), 1.0
                m = self._output("consistency", x, index, prompts, scale)
            return mean + shift * self._gradient(x, self._affine(x, m, self.rows, index, scale), prompts, len(m))

    def _gradient(self, x: Tensor, x0_hat: Tensor, prompts: list[str], rows: int) -> Tensor:
        """Of every sample's own reward at x_t."""
        family = self.backbone.family
        reward = self.reward(family.decode(x0_hat.to(family.dtype)), prompts)
        if not reward.requires_grad:
            raise UserError("this reward has no gradient to guide by; take best-of-n, which needs none")
        self.unet_pullbacks += rows
        self.reward_pullbacks += len(prompts)
        (gradient,) = torch.autograd.grad(reward.sum(), x)
        if not torch.isfinite(gradient).all():
            raise UserError("the reward's gradient is not finite; lower the guidance scale or repair its backward pass")
        return gradient

    def _output(self, role: Role, x: Tensor, index: Tensor, prompts: list[str], scale: float) -> Tensor:
        family = self.backbone.family
        unconditional = None if scale == 1 else family.encode([""])
        with self.backbone.role(role):
            return self.backbone.predict(x, self.tables.timesteps[index], family.encode(prompts), unconditional)

    def _affine(self, x: Tensor, m: Tensor, rows: Tensor, index: Tensor, scale: float) -> Tensor:
        return posterior_mean(x, m, rows, index, guidance_scale=scale, impl=self.sampler.impl)

    def _noise(self, seeds: Tensor) -> Tensor:
        family = self.backbone.family
        return philox_normal(seeds.to(family.device), family.latent_shape, dtype=family.precision, device=family.device)
