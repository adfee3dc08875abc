"""Every seed of a run, derived from the run's own.

Noise is counter based (see sqdf_fast.kernels.philox): it depends on the run, the purpose, the step and the sample
alone, never on batch sizes, chunking or what was drawn before. So a resumed run needs no generator state.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from sqdf_fast.kernels.philox import derive_seed, derive_seeds


class Stream(IntEnum):
    """What a seed is for. The numbers are part of a run's identity: append, never renumber."""

    REFILL = 0
    TRANSITION = 1
    REPLAY = 2
    PROMPTS = 3
    EVALUATION = 4
    LORA = 5
    INITIAL = 6
    DENOISING = 7
    DISTILL = 8
    PREFLIGHT = 9
    ROUNDING = 10
    RENOISING = 11
    LATE_STEP = 12
    CANDIDATE = 13


def sample_seeds(run_seed: int, stream: Stream, step: int, samples: Tensor | int) -> Tensor:
    """One int64 seed per sample: of samples 0..n-1 (an int) or of the given sample ids [B] int64."""
    ids = torch.arange(samples) if isinstance(samples, int) else samples
    return derive_seeds(run_seed, stream, step, ids=ids)


def generator(run_seed: int, stream: Stream, step: int) -> torch.Generator:
    """A CPU generator for draws other than noise (prompts, states)."""
    return torch.Generator().manual_seed(derive_seed(run_seed, stream, step) & (2**63 - 1))
