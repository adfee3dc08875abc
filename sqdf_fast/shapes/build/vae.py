"""The autoencoder: 64x64 RGB to 16x16x4 latents that are near zero mean and unit variance.

Encoder and decoder are trained together first; then the encoder is frozen, so that latents made with it stay valid,
and the decoder alone is finished with a falling learning rate.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from sqdf_fast.shapes.render import render, sample_attributes

LEARNING_RATE = 2e-3
EDGE_WEIGHT = 0.1
WHITENING_WEIGHT = 0.01
LATENT_NOISE = 0.05
EVALUATION_IMAGES = 256
# The joint phase stops while the one-cycle learning rate of a run this much longer is still high.
CYCLE = 5 / 3


def make_vae(channels: int = 24) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 3,
        decoder_block_out_channels=(channels,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        scaling_factor=1.0,
    )


def make_images(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Renders [N, 3, 64, 64] in [-1, 1]."""
    parts = [render(sample_attributes(min(256, count - first), rng)) for first in range(0, count, 256)]
    return torch.from_numpy(np.concatenate(parts)).mul(2).sub(1).contiguous(memory_format=torch.channels_last)


def edge_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the horizontal and vertical differences: what keeps outlines sharp."""
    across = F.l1_loss(made.diff(dim=-1), wanted.diff(dim=-1))
    down = F.l1_loss(made.diff(dim=-2), wanted.diff(dim=-2))
    return across + down


def vae_loss(vae: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Reconstruction of ``images`` [B, 3, 64, 64] in [-1, 1], and the distance of the latents from white."""
    latents = vae.encode(images).latents.float()
    noisy = latents + LATENT_NOISE * torch.randn_like(latents)
    made = vae.decode(noisy).sample.float()
    mean, variance = latents.mean(dim=(0, 2, 3)), latents.var(dim=(0, 2, 3))
    whitening = mean.square().mean() + (variance - 1).square().mean()
    return F.mse_loss(made, images) + EDGE_WEIGHT * edge_loss(made, images) + WHITENING_WEIGHT * whitening


@torch.no_grad()
def signal_to_noise(vae: AutoencoderTiny, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB; ``images`` in [-1, 1]."""
    made = vae.decode(vae.encode(images).latents).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((made - images) / 2).square().mean()))


def train_vae(folder: Path, seed: int, steps: int, batch: int = 16, pool: int = 16384) -> float:
    """Train both halves from nothing into a diffusers folder; returns the signal-to-noise ratio on fresh renders."""
    torch.manual_seed(seed)
    return _train(make_vae(), folder, seed, steps, batch, pool, cycle=round(CYCLE * steps))


def finish_decoder(folder: Path, seed: int, steps: int, batch: int = 16, pool: int = 8192) -> float:
    """Train the decoder in ``folder`` on, its encoder frozen; returns the ratio on fresh renders."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny.from_pretrained(folder)
    vae.encoder.requires_grad_(False)
    return _train(vae, folder, seed, steps, batch, pool, cycle=steps)


def _train(vae: AutoencoderTiny, folder: Path, seed: int, steps: int, batch: int, pool: int, cycle: int) -> float:
    rng = np.random.default_rng(seed)
    images, fresh = make_images(pool, rng), make_images(min(EVALUATION_IMAGES, pool), rng)
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=cycle, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = vae_loss(vae, images[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            ratio, seconds = signal_to_noise(vae, fresh), time.monotonic() - started
            click.echo(f"vae step {step}/{steps} loss {loss.item():.4f} PSNR {ratio:.1f} dB {seconds:.0f} s")
    vae.save_pretrained(folder)
    ratio = signal_to_noise(vae, fresh)
    click.echo(f"PSNR on fresh renders: {ratio:.1f} dB")
    return ratio
