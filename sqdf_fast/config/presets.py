"""Named settings: the embedded world's, and those of the paper's tables and scripts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sqdf_fast.config.merging import merge

# Hyperparameters of the paper's tables and scripts (objective terms keep the names of docs/algorithm.md).
_PAPER: dict[str, Any] = {
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "reward": "aesthetic",
    "prompts": "animals",
    "steps": 500,
    "sampling": {"num_inference_steps": 50, "eta": 1.0, "guidance_scale": 5.0},
    "objective": {"alpha": 2.0, "gamma": 0.9, "lookahead": "consistency", "mask_nonpositive": True},
    "policy": {"rank": 4},
    "optimizer": {"lr": 1e-3, "weight_decay": 1e-4, "max_grad_norm": 1.0, "batch_size": 64},
    "replay": {"capacity": 1024, "mode": "uniform", "refill": 64, "steps_per_refill": 1},
}

PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {
        "model": "shapes",
        "reward": "taste",
        "prompts": "shapes",
        "steps": 80,
        "checkpoint_every": 40,
        "sampling": {"num_inference_steps": 20, "guidance_scale": 4.0, "batch_size": 16},
        "objective": {"alpha": 16.0, "gamma": 0.9},
        "policy": {"rank": 8},
        "optimizer": {"lr": 1e-3, "batch_size": 16},
        "execution": {
            "executor": "joint",
            "micro_batch": 16,
            "forward_batch_rows": 32,
            "backward_batch_rows": 32,
            "decode_images": 16,
        },
        "replay": {"capacity": 64, "refill": 16, "steps_per_refill": 8},
        "evaluation": {
            "prompts": "shapes-held-out",
            "every": 20,
            "num_prompts": 32,
            "held_out": ("taste-held-out",),
        },
    },
    "aesthetic": _PAPER,
    "sdxl": merge(
        _PAPER,
        {"model": "stabilityai/stable-diffusion-xl-base-1.0", "objective": {"mask_nonpositive": False}},
    ),
    "sd35": merge(
        _PAPER,
        {
            "model": "stabilityai/stable-diffusion-3.5-medium",
            "sampling": {"num_inference_steps": 40, "eta": 0.7, "guidance_scale": 4.5},
            "objective": {"lookahead": "tweedie", "mask_nonpositive": False},
        },
    ),
    "flux": merge(
        _PAPER,
        {
            "model": "black-forest-labs/FLUX.1-dev",
            "sampling": {"num_inference_steps": 28, "eta": 0.9, "guidance_scale": 1.0},
            "objective": {"lookahead": "tweedie", "mask_nonpositive": False},
        },
    ),
    "hpsv2": merge(
        _PAPER,
        {
            "reward": "hpsv2",
            "objective": {"alpha": 0.05, "gamma": 0.93},
            "policy": {"rank": 32},
            "optimizer": {"lr": 5e-4, "batch_size": 256},
            "replay": {"capacity": 4096, "refill": 256},
        },
    ),
    "black-box": merge(
        _PAPER,
        {
            "sampling": {"guidance_scale": 7.5},
            "objective": {"alpha": 1.0},
            "optimizer": {"weight_decay": 0.1, "max_grad_norm": 5.0},
            "replay": {"mode": "prioritised"},
        },
    ),
}
PRESETS["hpsv2-script"] = merge(
    PRESETS["hpsv2"], {"objective": {"alpha": 0.005, "gamma": 0.9}, "optimizer": {"lr": 2e-4}}
)

CONSISTENCY_SAMPLING: dict[str, Any] = {"sampling": {"num_inference_steps": 4, "guidance_scale": 1.0}}
"""How a consistency model is sampled: few steps, guidance distilled in."""


_log = logging.getLogger(__name__)


def default_preset(model: str) -> str:
    """The preset for a model that none was named for; a model that no preset is of takes the paper's, "aesthetic"."""
    short = {"shapes": "shapes", "sdxl": "sdxl", "sd35-medium": "sd35", "flux1-dev": "flux"}
    return short.get(model) or next((name for name in short.values() if PRESETS[name]["model"] == model), "aesthetic")


def preset_for(file: Mapping[str, Any], assignments: Mapping[str, Any], flags: Mapping[str, Any]) -> str | None:
    """The preset of settings without one; None if they name one or need none."""
    layers = (flags, file, assignments)
    if "objective" in file or any("preset" in layer for layer in layers):
        return None
    models = [layer["model"] for layer in layers if "model" in layer]
    if models:
        return default_preset(models[0])
    import torch

    if torch.cuda.is_available():
        return "aesthetic"
    _log.warning("No CUDA GPU and no --model: training the embedded shapes model on the CPU.")
    return "shapes"
