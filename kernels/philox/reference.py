"""Philox-4x32-10 in plain PyTorch integers, on any device that has int64 and float64.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_MASK = 0xFFFFFFFF


class Draw(NamedTuple):
    """What is drawn: `numel` elements of every sample, from its seed, int64 [B]."""

    seed: torch.Tensor
    numel: int


def philox_4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten Philox rounds.

    Args:
        counter: int64 [..., 4], four 32-bit words, each in 0 .. 2^32 - 1.
        key: int64 [..., 2], two 32-bit words, broadcast against counter.

    Returns:
        int64 [..., 4], four 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # The product of two 32-bit words reaches the sign bit of int64; masking after the shift undoes that.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product2 >> 32) & _MASK) ^ c1 ^ k0, product2 & _MASK
        c2, c3 = ((product0 >> 32) & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def words(draw: Draw) -> torch.Tensor:
    """Words of a sample's elements: int64 [B, 4 * ceil(numel / 4)], in 0 .. 2^32 - 1."""
    seed, numel = draw
    counters = math.ceil(numel / 4)
    counter = torch.zeros(1, counters, 4, dtype=torch.int64, device=seed.device)
    counter[..., 0] = torch.arange(counters, device=seed.device)
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK], dim=-1)
    return philox_4x32(counter, key[:, None]).flatten(1)


def uniform(word: torch.Tensor) -> torch.Tensor:
    """Words in int64 -> float32 in [0, 1): read as int32, folded to its non-negative half, scaled."""
    folded = torch.where(word >= 2**31, _MASK - word, word)
    return folded.to(torch.float32) * 4.6566127342e-10


def normal(draw: Draw) -> torch.Tensor:
    """Box-Muller on neighboring words: float32 [B, numel].

    The two float32 inputs of the transform, u1 clamped at 1e-7 and the angle 2 pi u2, are rounded as on a GPU. The rest
    is computed in float64 and rounded once, so it does not depend on a backend's vector mathematics.
    """
    u1, u2 = uniform(words(draw)).unflatten(1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp(min=1e-7).double()))
    angle = (u2 * (2.0 * math.pi)).double()
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, : draw.numel].float()
