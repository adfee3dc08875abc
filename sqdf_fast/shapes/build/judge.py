"""The judge: both of its networks, on renders of their own seed."""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sqdf_fast.shapes.build.unet import captions
from sqdf_fast.shapes.judge import LEARNED_MEASURES, Judge, learned_measures
from sqdf_fast.shapes.prompts import named_indices, parse
from sqdf_fast.shapes.render import SIZES, Attributes, render, sample_attributes

LEARNING_RATE = 2e-3


def save_half(module: nn.Module, path: Path) -> None:
    """Write the weights as float16 safetensors, replacing ``path`` in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    save_file({name: value.half().contiguous() for name, value in module.state_dict().items()}, fresh)
    fresh.rename(path)


def fits(attributes: Attributes, prompts: list[str]) -> torch.Tensor:
    """Whether image i shows what prompt j names, bool [N, M]."""
    named = [parse(prompt) for prompt in prompts]
    shape, color = named_indices(prompts)
    low = np.array([SIZES[name.size][0] if name.size else 0.0 for name in named])
    high = np.array([SIZES[name.size][1] if name.size else 1.0 for name in named])
    size = attributes.size[:, None]
    right = (attributes.shape[:, None] == shape) & (low <= size) & (size <= high)
    return torch.from_numpy(right & ((attributes.color[:, None] == color) | (color < 0)))


def roughen(images: torch.Tensor) -> torch.Tensor:
    """Some blur and some noise, so that a decoder's softness is nothing new to the judge."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1)
    noise = 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
    return (images + share * (blurred - images) + noise).clamp(0, 1)


def train_judge(path: Path, seed: int, steps: int, batch: int = 64, pool: int = 20480) -> tuple[float, float]:
    """Train both networks, write one file, return the accuracies of shape and color on fresh renders."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    attributes = sample_attributes(pool, rng)
    parts = [render(attributes[np.arange(first, min(first + 256, pool))]) for first in range(0, pool, 256)]
    images = torch.from_numpy(np.concatenate(parts))
    prompts, measures = captions(attributes, rng), learned_measures(attributes)
    shapes, colors = torch.from_numpy(attributes.shape), torch.from_numpy(attributes.color)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(pool, (batch,))
        seen = roughen(images[chosen])
        shape, color, measured = judge.attributes(seen)
        loss = F.cross_entropy(shape, shapes[chosen]) + F.cross_entropy(color, colors[chosen])
        loss = loss + F.smooth_l1_loss(measured, measures[chosen])
        texts = [prompts[index] for index in chosen.tolist()]
        cosines = judge.pair.embed_images(seen) @ judge.pair.embed_prompts(texts).T
        logits = judge.pair.scale * cosines + judge.pair.offset
        loss = loss + 10 * F.binary_cross_entropy_with_logits(logits, fits(attributes[chosen.numpy()], texts).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            click.echo(f"judge step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")
    save_half(judge, path)
    return report_judge(judge.eval(), seed + 1)


@torch.no_grad()
def report_judge(judge: Judge, seed: int, count: int = 1024) -> tuple[float, float]:
    """Print what the judge makes of fresh renders; returns the accuracies of shape and color."""
    rng = np.random.default_rng(seed)
    attributes = sample_attributes(count, rng)
    images, prompts = torch.from_numpy(render(attributes)), captions(attributes, rng)
    shape, color, measured = judge.attributes(images)
    shape_right = float((shape.argmax(dim=1).numpy() == attributes.shape).mean())
    color_right = float((color.argmax(dim=1).numpy() == attributes.color).mean())
    error = (measured - learned_measures(attributes)).square().mean(dim=0)
    own = judge.alignment(images, prompts).mean()
    other = judge.alignment(images, prompts[1:] + prompts[:1]).mean()
    click.echo(
        f"judge on fresh renders: shape {shape_right:.3f} color {color_right:.3f} "
        f"alignment {own:.3f} (another's prompt {other:.3f})"
    )
    errors = " ".join(f"{name} {value:.3f}" for name, value in zip(LEARNED_MEASURES, error.tolist(), strict=True))
    click.echo(f"squared error of the standardized measures: {errors}")
    return shape_right, color_right
