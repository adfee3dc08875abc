"""Philox on the CPU through the native library, with the arguments and results of reference.py."""

from __future__ import annotations

import math

import torch

from sqdf_fast.kernels import native
from sqdf_fast.kernels.native import unavailable

__all__ = ["normal", "unavailable", "words"]


def words(seed: torch.Tensor, numel: int) -> torch.Tensor:
    """seed int64 [B] -> int64 [B, 4 * ceil(numel / 4)], values in 0 .. 2^32 - 1."""
    out = seed.new_empty(len(seed), 4 * math.ceil(numel / 4), dtype=torch.int32)
    return _fill("sqdf_fast_philox_words", seed, out).to(torch.int64) & 0xFFFFFFFF


def normal(seed: torch.Tensor, numel: int) -> torch.Tensor:
    """seed int64 [B] -> float32 [B, numel]."""
    return _fill("sqdf_fast_philox_normal", seed, seed.new_empty(len(seed), numel, dtype=torch.float32))


def _fill(name: str, seed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    seed = seed.contiguous()
    native.function(name, "pllpi")(seed.data_ptr(), len(seed), out.shape[1], out.data_ptr(), native.threads())
    return out
