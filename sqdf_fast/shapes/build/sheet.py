"""Samples of the shipped pipeline: how good they are, and a sheet of them for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from sqdf_fast.shapes.judge import Judge
from sqdf_fast.shapes.prompts import HELD_OUT_PROMPTS
from sqdf_fast.shapes.rewards import hidden_rule

GUIDANCE_SCALE, SAMPLING_STEPS, ETA = 4.0, 20, 1.0
SHEET_PROMPTS = (
    "a large red star", "a small blue circle", "an orange heart", "a green cross", "a purple ring", "a yellow triangle",
    "a medium pink square", "a black star", "a heart", "a large circle", "a small green triangle", "a large blue cross",
)  # fmt: skip


@torch.no_grad()
def draw_samples(folder: Path, prompts: Sequence[str], seed: int, batch: int = 32) -> torch.Tensor:
    """Guided samples of the pipeline in ``folder``, one a prompt, float32 [N, 3, 64, 64] in [0, 1]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        pipeline(
            list(prompts[first : first + batch]), num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE_SCALE,
            eta=ETA, generator=generator, output_type="pt",
        ).images
        for first in range(0, len(prompts), batch)
    ]  # fmt: skip
    return torch.cat(parts)


def report_samples(folder: Path, judge: Judge, seed: int, repeats: int = 6) -> tuple[float, float]:
    """Print what the judge and the rule make of samples for held-out prompts; returns shape and color accuracy."""
    prompts = [prompt for prompt in HELD_OUT_PROMPTS for _ in range(repeats)]
    images = draw_samples(folder, prompts, seed)
    accuracy = judge.attribute_accuracy(images, prompts)
    shuffled = prompts[repeats:] + prompts[:repeats]
    own, other = judge.alignment(images, prompts).mean(), judge.alignment(images, shuffled).mean()
    rule = hidden_rule(images, prompts)
    click.echo(
        f"{len(prompts)} samples for held-out prompts: shape {accuracy.shape:.3f} color {accuracy.color:.3f} "
        f"diversity {judge.diversity(images, prompts):.3f} alignment {own:.3f} (another's prompt {other:.3f}) "
        f"true reward {rule.mean():.2f} +- {rule.std():.2f}"
    )
    return accuracy.shape, accuracy.color


def save_sheet(folder: Path, path: Path, seed: int, columns: int = 6, scale: int = 2) -> None:
    """Write an image of samples: a row a prompt, the prompt beside it, two prompts side by side."""
    prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(columns)]
    images = draw_samples(folder, prompts, seed).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    cell, label = 64 * scale, 110
    half, rows = label + columns * cell, -(-len(SHEET_PROMPTS) // 2)
    sheet = Image.new("RGB", (2 * half, rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(SHEET_PROMPTS):
        left, top = (row % 2) * half, (row // 2) * cell
        pen.multiline_text(
            (left + 6, top + cell // 2 - 12), "\n".join(textwrap.wrap(prompt, 14)), fill="black", font_size=14
        )
        for column in range(columns):
            image = Image.fromarray(images[row * columns + column]).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + label + column * cell, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
