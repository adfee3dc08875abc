"""Rewards of the embedded world: the hidden rule, the taste network that imitates it, an analytic one.

Every reward maps images float [B, 3, 64, 64] in [0, 1] and their B prompts to [B], float32 for float32 images; none
looks at the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from sqdf_fast.shapes.segmentation import segment

WEIGHTS = Path(__file__).parent / "weights"
WARMTH_UNIT, BEST_WARMTH, EXCESS_WEIGHT = 0.09, 0.24, 4.0
BEST_DIAMETER, DIAMETER_WIDTH = 0.48, 0.20
CENTER_WIDTH = 0.35
CLUTTER_UNIT = 0.03
CLEAN_FROM, CLEAN_WEIGHT = 0.7, 12.0
MIN_AREA = 0.02


def warmth_term(warmth: torch.Tensor) -> torch.Tensor:
    """Red minus blue of the background in units of .09: the better the warmer up to .24, then falling.

    The fall is four times as steep as the rise.
    """
    excess = (warmth - BEST_WARMTH).clamp(min=0)
    return (warmth - (1 + EXCESS_WEIGHT) * excess) / WARMTH_UNIT


@torch.no_grad()
def hidden_rule(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The true reward: a warm, plain background and one object of middling size near the middle.

    An image in which no single flat object stands out loses in proportion to what two flat regions leave
    unexplained. It is never shown to training; the taste network is its imitation.
    """
    parts = segment(images)
    warmth = parts.background[:, 0] - parts.background[:, 2]
    size = -((parts.diameter - BEST_DIAMETER) / DIAMETER_WIDTH).square().clamp(max=4.0)
    center = -(parts.off_center / CENTER_WIDTH).square()
    clutter = -parts.clutter / CLUTTER_UNIT
    unclean = (CLEAN_FROM - parts.explained).clamp(min=0)
    area = parts.mask.mean(dim=(1, 2))
    missing = (1 - area / MIN_AREA).clamp(min=0)
    return warmth_term(warmth) + size + center + clutter - CLEAN_WEIGHT * unclean - 4 * missing


class TasteNetwork(nn.Module):
    """The proxy reward: a small convolutional network trained on few, noisy ratings of the hidden rule.

    Differentiable with respect to the images. Scores are in the rule's units.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width // 2, width, width, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.score = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        features = self.features((F.avg_pool2d(images, 2) - 0.75) * 4)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return self.score(pooled).squeeze(1)


def warmth(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Mean red minus mean blue of the whole image: an analytic, differentiable reward in [-1, 1]."""
    return (images[:, 0] - images[:, 2]).float().mean(dim=(1, 2))


def load_taste(name: str = "taste", folder: Path = WEIGHTS) -> TasteNetwork:
    """The taste network in float32 and evaluation mode.

    Args:
        name: "taste", the proxy that training maximizes, or "taste-held-out", which learned from other ratings.
    """
    network = TasteNetwork()
    network.load_state_dict({name: value.float() for name, value in load_file(folder / f"{name}.safetensors").items()})
    return network.eval().requires_grad_(False)
