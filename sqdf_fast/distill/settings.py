"""The settings of a distillation, their bounds, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from sqdf_fast.config import Section, validate
from sqdf_fast.errors import UserError

Positive = Annotated[int, Field(ge=1)]


class Distillation(Section):
    """Consistency distillation; see docs/distill.md."""

    num_trajectories: Positive = Field(1024, description="trajectories of the guided model to learn from")
    num_inference_steps: Positive = Field(50, description="denoising steps T of a trajectory")
    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance g, distilled into the LoRA")
    stochastic: float = Field(0.25, ge=0, le=1, description="share of trajectories that begin with noisy steps")
    sampling_batch_size: Positive = Field(4, description="trajectories denoised at once")
    rank: Positive = Field(64, description="LoRA rank")
    target_modules: tuple[str, ...] = Field(
        (
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
        ),
        min_length=1,
        description="layers that get a LoRA, by suffix",
    )
    steps: Positive = Field(2000, description="optimizer steps")
    lr: float = Field(1e-3, gt=0, description="learning rate at the start; falls to 0 along half a cosine")
    batch_size: Positive = Field(16, description="states an optimizer step averages over")
    micro_batch_size: Positive = Field(4, description="states whose graph is in memory at once")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this L2 norm")
    gradient_checkpointing: bool = Field(False, description="activation checkpointing of the network's blocks")
    evaluation_trajectories: Annotated[int, Field(ge=2)] = Field(
        64, description="fresh stochastic trajectories that the closing table is measured on"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="every random number derives from it")


DISTILLATION_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "shapes": {
        "num_trajectories": 512,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "sampling_batch_size": 32,
        "rank": 12,
        "steps": 600,
        "micro_batch_size": 16,
    },
}


def make_distillation(preset: str = "default", settings: Mapping[str, Any] | None = None) -> Distillation:
    """A preset with ``settings`` over it, validated.

    Raises:
        UserError: unknown preset or key, or a value out of its bounds: one line that says what is allowed.
    """
    if preset not in DISTILLATION_PRESETS:
        raise UserError(f"preset {preset!r} is unknown; allowed: {', '.join(DISTILLATION_PRESETS)}")
    return validate(Distillation, {**DISTILLATION_PRESETS[preset], **(settings or {})})
