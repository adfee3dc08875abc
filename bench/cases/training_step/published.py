"""The published text-to-image program's training step, written from its description.

Three networks are resident: the policy with its LoRA, a frozen reference, a consistency model with its own LoRA.
Policy, look-ahead, decoder and reward of a whole micro-batch are one autograd graph without gradient checkpointing. The
consistency model runs both halves of a guided batch and the unconditional one is thrown away, its guidance being 1; the
look-ahead of the sampler's last step is computed and then discarded. It takes diffusers' modules and DDIM, and shares
no code with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class Quirks:
    """Habits of the published program that change the numbers, not the work. `NO_QUIRKS` for comparisons.

    With a grid, the consistency model's timestep is moved to the nearest of so many points of LCM's own grid.
    """

    denormalized_twice: bool = True  # the reward receives images squeezed into [0.5, 1]
    hard_clamp: bool = True  # saturated pixels pass no gradient
    masked: bool = True  # a sample with a non-positive reward loses its KL too
    grid: int | None = 50


NO_QUIRKS = Quirks(denormalized_twice=False, hard_clamp=False, masked=False, grid=None)


@dataclass(frozen=True)
class PublishedLoss:
    """Of a micro-batch: the mean loss [] with its graph; reward, kl: [B] detached."""

    loss: Tensor
    reward: Tensor
    kl: Tensor


class Published:
    """One optimizer step's gradient, the published way, with DDIM at eta = 1.

    Args:
        policy, reference, consistency: UNets of diffusers, adapters on; only the policy's LoRA requires a gradient.
        vae: its decoder; reward: (images [B, 3, H, W], prompts) to [B].
        scheduler: of epsilon prediction; num_inference_steps: T.
        alpha, gamma: KL coefficient, discount; guidance_scale: of policy and reference.

    Attributes:
        on_stage: receives "forward" and "backward" as they begin.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        consistency: nn.Module,
        vae: nn.Module,
        reward: Callable[[Tensor, Sequence[str]], Tensor],
        scheduler: DDIMScheduler,
        *,
        num_inference_steps: int,
        alpha: float,
        gamma: float,
        guidance_scale: float,
        quirks: Quirks,
        device: torch.device | str = "cpu",
    ) -> None:
        self.policy, self.reference, self.consistency = policy, reference, consistency
        self.vae, self.reward, self.quirks = vae, reward, quirks
        self.alpha, self.gamma, self.guidance_scale, self.steps = alpha, gamma, guidance_scale, num_inference_steps
        self.on_stage: Callable[[str], None] = lambda name: None
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"the published program predicts epsilon, not {scheduler.config.prediction_type}")
        own = DDIMScheduler.from_config(scheduler.config)
        own.set_timesteps(num_inference_steps)
        self.timesteps = own.timesteps.to(device)
        self.stride = own.config.num_train_timesteps // num_inference_steps
        # One more level, at index -1, for the step that ends beyond the first.
        levels = torch.cat([own.alphas_cumprod, own.final_alpha_cumprod.reshape(1)])
        self.alphas_cumprod = levels.double().to(device)
        if quirks.grid is not None:
            lcm = LCMScheduler.from_config(scheduler.config)
            lcm.set_timesteps(quirks.grid)
            self.grid = lcm.timesteps.to(device)

    def accumulate(
        self, latents: Tensor, index: Tensor, inputs: dict[str, Tensor], prompts: Sequence[str], noise: Tensor
    ) -> PublishedLoss:
        """Add the gradient of a micro-batch's mean loss to the policy's parameters. Arguments as of :meth:`loss`."""
        self.on_stage("forward")
        found = self.loss(latents, index, inputs, prompts, noise)
        self.on_stage("backward")
        found.loss.backward()
        return PublishedLoss(found.loss.detach(), found.reward, found.kl)

    def loss(
        self, latents: Tensor, index: Tensor, inputs: dict[str, Tensor], prompts: Sequence[str], noise: Tensor
    ) -> PublishedLoss:
        """The loss of a micro-batch.

        Args:
            latents: x_t [B, ...]; index: [B] positions in the sampler's timesteps; noise: z, like the latents.
            inputs: the network's keywords, each [2B, ...] ordered [unconditional; conditional]: encoder_hidden_states,
                and for SDXL text_embeds and time_ids.
        """
        t = self.timesteps[index]
        prediction = self._guided(self.policy, latents, t, inputs)
        reference = self._guided(self.reference, latents, t, inputs)
        previous, kl = self._step(latents, prediction, reference, t, noise)
        estimate = self._look_ahead(previous, t - self.stride, inputs)
        last = (index == self.steps - 1).view(-1, 1, 1, 1)
        images = self._decode(torch.where(last, previous, estimate))
        if self.quirks.denormalized_twice:
            images = (images / 2 + 0.5).clamp(0, 1)
        reward = self.reward(images, prompts)
        discount = self.gamma ** (self.steps - 1 - index).to(reward.dtype)
        losses = -(discount * reward - self.alpha * kl)
        if self.quirks.masked:
            losses = losses * (reward > 0)
        return PublishedLoss(losses.mean(), reward.detach(), kl.detach())

    def _halves(self, network: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs of the doubled batch in the latents' precision, unconditional and conditional."""
        double = torch.cat([x] * 2).to(inputs["encoder_hidden_states"].dtype)
        added = {name: tensor for name, tensor in inputs.items() if name != "encoder_hidden_states"}
        output = network(
            double,
            torch.cat([t] * 2),
            encoder_hidden_states=inputs["encoder_hidden_states"],
            added_cond_kwargs=added or None,
        ).sample
        return output.to(x.dtype).chunk(2)

    def _guided(self, network: nn.Module, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        unconditional, conditional = self._halves(network, x, t, inputs)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _level(self, t: Tensor, x: Tensor) -> Tensor:
        return self.alphas_cumprod[t.clamp(min=-1)].view(-1, 1, 1, 1).to(x.dtype)

    def _step(self, x: Tensor, policy: Tensor, reference: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        now, then = self._level(t, x), self._level(t - self.stride, x)
        std = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()

        def mean(epsilon: Tensor) -> Tensor:
            original = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
            return then.sqrt() * original + (1 - then - std**2).sqrt() * epsilon

        policy_mean, reference_mean = mean(policy), mean(reference)
        kl = ((policy_mean - reference_mean) ** 2).flatten(1).mean(1) / std.flatten() ** 2
        return policy_mean + std * noise, kl

    def _look_ahead(self, x: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        t = t.clamp(min=0)
        if self.quirks.grid is not None:
            t = self.grid[(t[:, None] - self.grid[None]).abs().argmin(1)]
        unconditional, conditional = self._halves(self.consistency, x, t, inputs)
        epsilon = unconditional + 1 * (conditional - unconditional)
        level = self._level(t, x)
        original = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
        scaled = 10 * t.to(x.dtype).view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * x + out * original

    def _decode(self, latents: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        images = self.vae.decode(latents.to(dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        images = images.to(torch.promote_types(dtype, torch.float32)) / 2 + 0.5
        clamped = images.clamp(0, 1)
        return clamped if self.quirks.hard_clamp else images + (clamped - images).detach()
