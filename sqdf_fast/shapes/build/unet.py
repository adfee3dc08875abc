"""The guided noise predictor and its text encoder, trained together on latents of captioned renders."""

from __future__ import annotations

import copy
import math
import shutil
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from sqdf_fast.shapes.build.text import make_text_encoder, make_tokenizer
from sqdf_fast.shapes.build.vae import make_vae
from sqdf_fast.shapes.prompts import Named
from sqdf_fast.shapes.render import COLORS, SHAPES, SIZES, Attributes, render, sample_attributes

CHANNELS = (32, 64, 96)
LEARNING_RATE = 1.5e-3
WARMUP = 200
EMA_DECAY, EMA_EVERY = 0.996, 4
PROMPT_DROPOUT = 0.1
COLOR_NAMED, SIZE_NAMED = 0.8, 0.5


def make_unet(channels: tuple[int, int, int] = CHANNELS, text_width: int = 96) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels; trailing spacing, so that sampling starts from the noisiest one."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


def captions(attributes: Attributes, rng: np.random.Generator) -> list[str]:
    """A prompt for every image: the shape always, the color and the size sometimes."""
    color_named = rng.random(len(attributes)) < COLOR_NAMED
    size_named = rng.random(len(attributes)) < SIZE_NAMED
    prompts = []
    for index in range(len(attributes)):
        color = list(COLORS)[attributes.color[index]] if color_named[index] else None
        size = next(name for name, (_, high) in SIZES.items() if attributes.size[index] <= high)
        prompts.append(Named(SHAPES[attributes.shape[index]], color, size if size_named[index] else None).prompt())
    return prompts


@torch.no_grad()
def captioned_latents(vae: AutoencoderTiny, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Latents [N, 4, 16, 16] of ``count`` renders, scaled to unit variance, and their prompts."""
    rng = np.random.default_rng(seed)
    vae = vae.to(memory_format=torch.channels_last)
    latents, prompts = [], []
    for first in range(0, count, 64):
        attributes = sample_attributes(min(64, count - first), rng)
        images = torch.from_numpy(render(attributes)).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(images).latents.float().contiguous())
        prompts += captions(attributes, rng)
    return torch.cat(latents) * vae.config.scaling_factor, prompts


def draw_timesteps(alphas_cumprod: torch.Tensor, count: int) -> torch.Tensor:
    """Timesteps [count], one from each of ``count`` equal shares of a density proportional to min(1/A, 8).

    They are denser where noise is strong and the shape is decided.
    """
    cumulative = (1 / alphas_cumprod).clamp(max=8.0).cumsum(dim=0)
    shares = (torch.arange(count) + torch.rand(count)) / count
    return torch.searchsorted(cumulative, shares * cumulative[-1]).clamp(max=len(cumulative) - 1)


class Denoiser(nn.Module):
    """The UNet and its text encoder, trained as one: (noisy latents, timesteps, token ids) -> predicted noise."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0], return_dict=False)[0]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 2 % of the peak; as a fraction of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP)
    return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the exponential moving average one step; it follows faster while training is young."""
    decay = min(EMA_DECAY, (1 + step) / (40 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_pipeline(folder: Path, vae: AutoencoderTiny, denoiser: Denoiser) -> None:
    """Write a plain StableDiffusionPipeline folder, replacing ``folder`` in one move.

    UNet and autoencoder are stored in half precision, which diffusers loads as float32; the text encoder stays in
    float32, for transformers would load what is stored.
    """
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(denoiser.text_encoder),
        tokenizer=make_tokenizer(),
        unet=copy.deepcopy(denoiser.unet),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(fresh)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def diffusion_loss(denoiser: Denoiser, clean: torch.Tensor, tokens: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise; ``clean`` [B, 4, 16, 16], token ids [B, 8]."""
    timesteps = draw_timesteps(alphas, len(clean))
    noise = torch.randn_like(clean)
    level = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    return F.mse_loss(denoiser(noisy.contiguous(memory_format=torch.channels_last), timesteps, tokens), noise)


def train_unet(
    folder: Path,
    vae_folder: Path,
    seed: int,
    steps: int,
    checkpoint: Path,
    batch: int = 32,
    pool: int = 24576,
    snapshots: int = 25,
) -> None:
    """Train from nothing, or continue from ``checkpoint`` if it exists, and write the pipeline into ``folder``.

    Args:
        checkpoint: a file for the training state, written with every snapshot.
        pool: number of renders to train on.
        snapshots: how many times the folder is written, at equal distances.
    """
    torch.manual_seed(seed)
    vae = make_vae()
    vae.load_state_dict(AutoencoderTiny.from_pretrained(vae_folder).state_dict())
    latents, prompts = captioned_latents(vae, pool, seed)
    tokenizer = make_tokenizer()
    free, *tokens = tokenizer(["", *prompts], padding="max_length", return_tensors="pt").input_ids
    tokens = torch.stack(tokens)
    denoiser = Denoiser(make_unet().to(memory_format=torch.channels_last), make_text_encoder(tokenizer))
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    state: dict[str, Any] = {"denoiser": denoiser, "average": average, "optimizer": optimizer, "schedule": schedule}
    first = _resume(checkpoint, state) + 1 if checkpoint.exists() else 1
    torch.manual_seed(seed + first)
    alphas = make_scheduler().alphas_cumprod
    running, started = 1.0, time.monotonic()
    for step in range(first, steps + 1):
        chosen = torch.randint(len(latents), (batch,))
        prompt = torch.where(torch.rand(batch, 1) < PROMPT_DROPOUT, free, tokens[chosen])
        loss = diffusion_loss(denoiser, latents[chosen], prompt, alphas)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EMA_EVERY == 0:
            follow(average, denoiser, step)
        running += (loss.item() - running) * max(0.01, 1 / step)
        if step % max(1, steps // snapshots) == 0 or step == steps:
            click.echo(f"unet step {step}/{steps} loss {running:.4f} {time.monotonic() - started:.0f} s")
            save_pipeline(folder, vae, average)
            torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, checkpoint)


def _resume(checkpoint: Path, state: dict[str, Any]) -> int:
    saved = torch.load(checkpoint)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])
