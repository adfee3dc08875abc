"""The embedded world: a tiny pretrained text-to-image pipeline, its prompts, its rewards and its judges.

Everything is made by the project from nothing (``python -m sqdf_fast.shapes.build``) and shipped with the package,
so that the whole job runs on a laptop's CPU along the code path of the large models.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqdf_fast.shapes.judge import Judge
    from sqdf_fast.shapes.prompts import ALL_PROMPTS, HELD_OUT_PROMPTS, TRAIN_PROMPTS
    from sqdf_fast.shapes.rewards import TasteNetwork, hidden_rule

__all__ = [
    "ALL_PROMPTS",
    "HELD_OUT_PROMPTS",
    "TRAIN_PROMPTS",
    "consistency_lora_folder",
    "hidden_rule",
    "load_judge",
    "load_taste",
    "pipeline_folder",
]

_WEIGHTS = Path(__file__).parent / "weights"
_HOMES = {
    "ALL_PROMPTS": "prompts",
    "HELD_OUT_PROMPTS": "prompts",
    "TRAIN_PROMPTS": "prompts",
    "hidden_rule": "rewards",
}


def pipeline_folder() -> Path:
    """The pretrained pipeline, an ordinary diffusers StableDiffusionPipeline folder."""
    return _WEIGHTS / "pipeline"


def consistency_lora_folder() -> Path:
    """The pipeline's consistency LoRA: a folder with ``pytorch_lora_weights.safetensors``."""
    return _WEIGHTS / "consistency_lora"


def load_taste(name: str = "taste") -> TasteNetwork:
    """A learned reward: ``(images [B, 3, 64, 64] in [0, 1], prompts) -> [B]``, differentiable.

    Args:
        name: "taste", the proxy that training maximizes, or "taste-held-out", which learned from other ratings.
    """
    rewards = import_module("sqdf_fast.shapes.rewards")
    return rewards.load_taste(_WEIGHTS / f"{name}.safetensors")


def load_judge() -> Judge:
    """The judge of prompt alignment, attribute accuracy and diversity."""
    judge = import_module("sqdf_fast.shapes.judge")
    return judge.load_judge(_WEIGHTS / "judge.safetensors")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sqdf_fast.shapes.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
