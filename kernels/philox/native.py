"""Philox on the CPU through the native library, with the arguments and results of reference.py."""

from __future__ import annotations

import math

import torch

from sqdf_fast.kernels import native
from sqdf_fast.kernels.native import unavailable
from sqdf_fast.kernels.philox.reference import Draw

__all__ = ["normal", "unavailable", "words"]


def words(draw: Draw) -> torch.Tensor:
    """int64 [B, 4 * ceil(numel / 4)], values in 0 .. 2^32 - 1."""
    seed, numel = draw
    out = seed.new_empty(len(seed), 4 * math.ceil(numel / 4), dtype=torch.int32)
    return _fill("sqdf_fast_philox_words", seed, out).to(torch.int64) & 0xFFFFFFFF


def normal(draw: Draw) -> torch.Tensor:
    """float32 [B, numel]."""
    seed, numel = draw
    return _fill("sqdf_fast_philox_normal", seed, seed.new_empty(len(seed), numel, dtype=torch.float32))


def _fill(name: str, seed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    seed = seed.contiguous()
    native.function(name, "pllpi")(seed.data_ptr(), len(seed), out.shape[1], out.data_ptr(), native.threads())
    return out
