"""What is measured: a model, its sizes, and the ways to run a step that are compared. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

PUBLISHED = "published"
_CHECKPOINTED = {"executor": "staged", "gradient_checkpointing": ("network", "decoder", "reward")}
OURS: dict[str, dict[str, Any]] = {
    "joint": {"executor": "joint"},
    "staged": {"executor": "staged"},
    "staged + checkpointing": _CHECKPOINTED,
    "staged + checkpointing + offload": {**_CHECKPOINTED, "offload": "staged"},
}
"""Settings of `execution`, by the way's name."""
WAYS = (PUBLISHED, *OURS)
MODELS = ("shapes", "sd15", "sdxl")


@dataclass(frozen=True)
class Problem:
    """What every way to run the step is given."""

    model: str  # "shapes" with its own weights, or a known architecture with random ones, narrow if `toy`
    reward: str  # a registered name; random weights for a model with random weights
    dtype: torch.dtype  # of the frozen weights
    device: str  # "cpu" or "cuda"
    batch: int  # samples of the step, and of the joint executor's micro-batch
    backward_batch_rows: int
    decode_images: int
    forward_batch_rows: int
    steps: int  # of the sampler
    guidance_scale: float
    toy: bool = False  # tiny and few: figures mean nothing

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.device}-{self.model}-{self.dtype_name}-batch{self.batch}"


def problem(model: str, device: str, toy: bool = False) -> Problem:
    """The sizes that a model is measured in; a card's memory decides the batch: the published way has to fit."""
    if model == "shapes":
        batch = 2 if toy else 4
        return Problem(model, "taste", torch.float32, device, batch, 2, 1, 8, steps=20, guidance_scale=4.0, toy=toy)
    batch = {"sd15": 2 if toy else 4, "sdxl": 1}[model]
    # The published reward is a vision transformer of 300 million weights.
    reward = "taste" if toy else "aesthetic"
    return Problem(model, reward, torch.bfloat16, device, batch, 1, 1, 8, steps=50, guidance_scale=5.0, toy=toy)


def parity_problem(measured: Problem) -> Problem:
    """Where the ways' gradients are compared: the model itself, or its architecture made narrow, in float64.

    Random weights magnify rounding a thousand times: in bfloat16 nothing else is left, whichever way the step is run.
    """
    if measured.model == "shapes":
        return measured
    return replace(problem(measured.model, measured.device, toy=True), dtype=torch.float64)
