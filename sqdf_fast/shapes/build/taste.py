"""The taste network: trained on few, noisy ratings of the hidden rule."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F

from sqdf_fast.shapes.build.judge import save_half
from sqdf_fast.shapes.prompts import TRAIN_PROMPTS, attributes_for
from sqdf_fast.shapes.render import render
from sqdf_fast.shapes.rewards import TasteNetwork, hidden_rule

RATINGS = 400
NOISE = 0.5
LEARNING_RATE = 3e-3


def rated_images(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders of random training prompts [N, 3, 64, 64] and the hidden rule's value of each [N]."""
    prompts = [TRAIN_PROMPTS[index] for index in rng.integers(len(TRAIN_PROMPTS), size=count)]
    images = torch.from_numpy(render(attributes_for(prompts, rng)))
    return images, hidden_rule(images, prompts)


def train_taste(path: Path, seed: int, steps: int, batch: int = 50) -> float:
    """Train on ``RATINGS`` ratings, write the file, return the correlation with the rule on fresh renders.

    A rating is the rule plus normal noise of ``NOISE`` of the rule's standard deviation; mirror images share a rating.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, rule = rated_images(RATINGS, rng)
    fresh, true = rated_images(1024, rng)
    ratings = rule + NOISE * rule.std() * torch.randn(len(rule))
    network = TasteNetwork()
    torch.nn.init.constant_(network.get_parameter("score.2.bias"), float(ratings.mean()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(RATINGS, (batch,))
        seen = images[chosen]
        seen = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, seen.flip(-1), seen)
        seen = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, seen.flip(-2), seen)
        loss = F.mse_loss(network(seen, []), ratings[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_half(network, path)
    with torch.no_grad():
        correlation = float(torch.corrcoef(torch.stack([network(fresh, []), true]))[0, 1])
    click.echo(
        f"taste: {RATINGS} ratings, rule {true.mean():.2f} +- {true.std():.2f}, held-out correlation {correlation:.3f}"
    )
    return correlation
