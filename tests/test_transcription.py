"""A whole optimizer step against the published algorithm, transcribed in plain autograd.

The transcription shares no code with the engine: three separate networks with LoRA weights merged by hand, the
sampler's step, the consistency model's jump and the loss written out as in the paper's text-to-image program, with its
habits: the KL is the mean over a sample without the factor 1/2 and is dropped together with a non-positive reward, the
consistency model runs both guidance halves at the nearest point of LCM's own grid, the look-ahead of the last step is
computed and then discarded, decoded images are denormalised a second time for the reward, and micro-batches of equal
size are averaged.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.func import functional_call

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.joint import JointExecutor
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.schedule import DenoisingSchedule

STEPS, GUIDANCE, GAMMA, ALPHA = 50, 5.0, 0.9, 2.0
PROMPTS = ["a red star", "a blue ring", "a ring", "a star", "a red ring", "a blue star"]
INDEX = torch.tensor([0, 49, 17, 48, 47, 30])


@pytest.fixture(scope="module")
def model(low_contrast_model) -> Path:
    return low_contrast_model


@pytest.fixture(scope="module")
def consistency_lora(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("consistency")
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    backbone = Backbone(family, rank=3, target_modules=("to_q", "to_v", "conv1"), seed=5)
    stir(backbone, seed=100, scale=0.1)
    family.save_lora(folder, "policy")
    return folder


def stir(backbone: Backbone, seed: int, scale: float) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(backbone.policy_parameters.values()):
            generator = torch.Generator().manual_seed(seed + number)
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=scale)


def published_reward(images: torch.Tensor) -> torch.Tensor:
    """A differentiable score of both signs, on images in [0, 1] that are denormalised once more."""
    pixels = (images / 2 + 0.5).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=images.dtype).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=images.dtype).view(3, 1, 1)
    pixels = (pixels - mean) / std
    direction = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return 200 * (direction * (pixels - 1.3).sin()).flatten(1).mean(1) - 2.65


class Published:
    """The published program's training step."""

    def __init__(self, model: Path, consistency_lora: Path) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=torch.float64)
        self.alphas_cumprod = self.pipe.scheduler.alphas_cumprod.double()
        self.pipe.scheduler.set_timesteps(STEPS)
        self.timesteps = self.pipe.scheduler.timesteps
        lcm = LCMScheduler.from_config(self.pipe.scheduler.config)
        lcm.set_timesteps(STEPS)
        self.consistency_timesteps = lcm.timesteps
        self.base = dict(self.pipe.unet.named_parameters())
        tensors = load_file(consistency_lora / "pytorch_lora_weights.safetensors")
        self.consistency = self.merge({name.removeprefix("unet."): tensor.double() for name, tensor in tensors.items()})

    def merge(self, lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """W + B A for every adapted layer (LoRA alpha = rank)."""
        merged = dict(self.base)
        for name, down in lora.items():
            if not name.endswith("lora_A.weight"):
                continue
            layer = name.removesuffix(".lora_A.weight")
            up = lora[f"{layer}.lora_B.weight"]
            weight = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = weight + (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        return merged

    def unet(self, weights, sample, timestep, embeds):
        return functional_call(self.pipe.unet, weights, (sample, timestep), {"encoder_hidden_states": embeds}).sample

    def embed(self, prompts):
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            return self.pipe.text_encoder(tokens.input_ids)[0]

    def step_and_kl(self, noise_pred, ref_noise_pred, t, latents, noise):
        """DDIM with eta = 1 of policy and reference, and the KL of the two."""
        prev_t = (t - 1000 // STEPS).clamp(0, 999)
        alpha_prod, alpha_prod_prev = (self.alphas_cumprod[i].view(-1, 1, 1, 1) for i in (t, prev_t))
        beta_prod = 1 - alpha_prod
        variance = (1 - alpha_prod_prev) / beta_prod * (1 - alpha_prod / alpha_prod_prev)
        std = variance**0.5

        def mean(eps):
            original = (latents - beta_prod**0.5 * eps) / alpha_prod**0.5
            return alpha_prod_prev**0.5 * original + (1 - alpha_prod_prev - std**2) ** 0.5 * eps

        prev_mean, ref_prev_mean = mean(noise_pred), mean(ref_noise_pred)
        squared = ((ref_prev_mean - prev_mean) ** 2).flatten(1).mean(1)
        return prev_mean + std * noise, squared / std.flatten() ** 2

    def guide(self, prediction):
        uncond, text = prediction.chunk(2)
        return uncond + GUIDANCE * (text - uncond)

    def look_ahead(self, prev_sample, prev_t, embeds, kind):
        double = torch.cat([prev_sample] * 2)
        if kind == "tweedie":
            prediction = self.guide(self.unet(self.base, double, torch.cat([prev_t] * 2), embeds))
            alpha_prod = self.alphas_cumprod[prev_t].view(-1, 1, 1, 1)
            return (prev_sample - (1 - alpha_prod).sqrt() * prediction) / alpha_prod.sqrt()
        closest = (prev_t.unsqueeze(1) - self.consistency_timesteps.unsqueeze(0)).abs().argmin(dim=1)
        mapped = self.consistency_timesteps[closest]
        uncond, text = self.unet(self.consistency, double, torch.cat([mapped] * 2), embeds).chunk(2)
        prediction = uncond + 1 * (text - uncond)
        alpha_prod = self.alphas_cumprod[mapped].view(-1, 1, 1, 1)
        original = (prev_sample - (1 - alpha_prod).sqrt() * prediction) / alpha_prod.sqrt()
        scaled = mapped.double().view(-1, 1, 1, 1) * 10.0
        c_skip = 0.5**2 / (scaled**2 + 0.5**2)
        c_out = scaled / (scaled**2 + 0.5**2) ** 0.5
        return c_out * original + c_skip * prev_sample

    def loss(self, policy, latents, index, prompts, noise, kind, mask_nonpositive):
        """Of one micro-batch; policy: merged weights."""
        embeds = torch.cat([self.embed([""]).repeat(len(prompts), 1, 1), self.embed(prompts)])
        remaining = STEPS - index - 1
        t = self.timesteps[index]
        double, t_double = torch.cat([latents] * 2), torch.cat([t] * 2)
        noise_pred = self.guide(self.unet(policy, double, t_double, embeds))
        ref_noise_pred = self.guide(self.unet(self.base, double, t_double, embeds))
        prev_sample, kl = self.step_and_kl(noise_pred, ref_noise_pred, t, latents, noise)
        prev_t = self.timesteps[(index + 1).clamp(max=STEPS - 1)]
        x_0_hat = self.look_ahead(prev_sample, prev_t, embeds, kind)
        x_0 = torch.where((remaining == 0).view(-1, 1, 1, 1), prev_sample, x_0_hat)
        images = self.pipe.vae.decode(x_0 / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        assert images.abs().max() < 1, "a saturated pixel: the clamp below passes no gradient, the engine's does"
        images = (images * 0.5 + 0.5).clamp(0, 1)
        rewards = published_reward(images)
        loss = -((GAMMA ** remaining.double()) * rewards - ALPHA * kl)
        if mask_nonpositive:
            loss = loss * (rewards > 0).double()
        return loss.mean(), rewards, kl


@pytest.mark.parametrize("kind", ["consistency", "tweedie"])
@pytest.mark.parametrize("mask_nonpositive", [True, False])
def test_gradient_of_the_policy(model, consistency_lora, kind, mask_nonpositive):
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    backbone = Backbone(family, rank=4, consistency_lora=str(consistency_lora))
    stir(backbone, seed=0, scale=0.1)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seeds = torch.arange(6) * 7 - 3
    engine = JointExecutor(
        backbone,
        DenoisingSchedule.from_scheduler(family.scheduler, STEPS, 1.0),
        lambda images, prompts: published_reward(images),
        Objective(
            alpha=ALPHA,
            gamma=GAMMA,
            lookahead=kind,
            consistency_grid=50,
            mask_nonpositive=mask_nonpositive,
        ),
        guidance_scale=GUIDANCE,
        execution=Execution(executor="joint", micro_batch=4),
    )
    result = engine.accumulate(ReplayBatch(latents, INDEX, PROMPTS, torch.arange(6)), seeds)

    published = Published(model, consistency_lora)
    leaves = {
        name.replace(".policy", ""): parameter.detach().clone().requires_grad_()
        for name, parameter in backbone.policy_parameters.items()
    }
    weights = published.merge(leaves)
    noise = philox_normal(seeds, (4, 8, 8), dtype=torch.float64)
    total, rewards, kls = 0.0, [], []
    for part in (slice(0, 3), slice(3, 6)):  # gradient accumulation over two micro-batches
        loss, reward, kl = published.loss(
            weights, latents[part], INDEX[part], PROMPTS[part], noise[part], kind, mask_nonpositive
        )
        total = total + loss / 2
        rewards.append(reward.detach())
        kls.append(kl.detach())
    total.backward()

    rewards = torch.cat(rewards)
    assert (rewards > 0).any()
    assert (rewards <= 0).any(), "the mask needs something to drop"
    assert (torch.cat(kls) > 1e-6).all()
    torch.testing.assert_close(result.reward, rewards, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.kl, torch.cat(kls), rtol=1e-10, atol=0)
    assert result.loss == pytest.approx(total.item(), rel=1e-10)
    largest = max(leaf.grad.abs().max() for leaf in leaves.values())
    assert largest > 1e-3
    for name, parameter in backbone.policy_parameters.items():
        expected = leaves[name.replace(".policy", "")].grad
        assert expected.abs().max() > 0
        assert (parameter.grad - expected).abs().max() <= 1e-10 * largest, name


def test_gradient_of_a_policy_on_the_consistency_model(model, consistency_lora):
    """Policy and reference are the consistency model with and without a LoRA; a step is LCMScheduler's."""
    steps, index = 4, torch.tensor([0, 1, 2, 2, 0, 1])
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    backbone = Backbone(family, rank=4, consistency_lora=str(consistency_lora), base="consistency")
    stir(backbone, seed=0, scale=0.1)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seeds = torch.arange(6) * 7 - 3
    engine = JointExecutor(
        backbone,
        DenoisingSchedule.consistency_sampling(family.scheduler, steps),
        lambda images, prompts: published_reward(images),
        Objective(alpha=ALPHA, gamma=GAMMA, lookahead="consistency"),
        guidance_scale=1.0,
        execution=Execution(executor="joint", micro_batch=4),
    )
    result = engine.accumulate(ReplayBatch(latents, index, PROMPTS, torch.arange(6)), seeds)

    truth = Published(model, consistency_lora)
    lcm = LCMScheduler.from_config(truth.pipe.scheduler.config)
    lcm.set_timesteps(steps)
    embeds = truth.embed(PROMPTS)

    def jump(weights, x, t):
        eps, alpha_prod = truth.unet(weights, x, t, embeds), truth.alphas_cumprod[t].view(-1, 1, 1, 1)
        original = (x - (1 - alpha_prod).sqrt() * eps) / alpha_prod.sqrt()
        scaled = t.double().view(-1, 1, 1, 1) * 10.0
        return scaled / (scaled**2 + 0.25).sqrt() * original + 0.25 / (scaled**2 + 0.25) * x

    leaves = {
        name.replace(".policy", ""): parameter.detach().clone().requires_grad_()
        for name, parameter in backbone.policy_parameters.items()
    }
    truth.base = truth.consistency  # what the policy's LoRA is merged into
    policy = truth.merge(leaves)
    t, next_t = lcm.timesteps[index], lcm.timesteps[index + 1]
    alpha_next = truth.alphas_cumprod[next_t].view(-1, 1, 1, 1)
    mean, reference_mean = (alpha_next.sqrt() * jump(weights, latents, t) for weights in (policy, truth.consistency))
    kl = ((mean - reference_mean) ** 2 / (1 - alpha_next)).flatten(1).mean(1)
    x_prev = mean + (1 - alpha_next).sqrt() * philox_normal(seeds, (4, 8, 8), dtype=torch.float64)
    x_0 = jump(truth.consistency, x_prev, next_t)
    images = truth.pipe.vae.decode(x_0 / truth.pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert images.abs().max() < 1
    rewards = published_reward(images * 0.5 + 0.5)
    loss = (-(GAMMA ** (steps - 1 - index).double()) * rewards + ALPHA * kl).mean()
    loss.backward()

    torch.testing.assert_close(result.reward, rewards.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.kl, kl.detach(), rtol=1e-10, atol=0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-10)
    largest = max(leaf.grad.abs().max() for leaf in leaves.values())
    assert largest > 1e-3
    for name, parameter in backbone.policy_parameters.items():
        expected = leaves[name.replace(".policy", "")].grad
        assert (parameter.grad - expected).abs().max() <= 1e-10 * largest, name
