"""The embedded world: a tiny pretrained text-to-image pipeline, its prompts, its rewards and its judges.

The project makes all of it from nothing (``python -m sqdf_fast.shapes.build``) and ships it with the package, so that
the whole job runs on a laptop's CPU along the code path of the large models.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqdf_fast.shapes.judge import load_judge
    from sqdf_fast.shapes.prompts import ALL_PROMPTS, HELD_OUT_PROMPTS, TRAIN_PROMPTS
    from sqdf_fast.shapes.rewards import hidden_rule, load_taste

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

_MODULES = {"hidden_rule": "rewards", "load_taste": "rewards", "load_judge": "judge"}
_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_folder() -> Path:
    """The pretrained pipeline, an ordinary diffusers StableDiffusionPipeline folder."""
    return _WEIGHTS / "pipeline"


def consistency_lora_folder() -> Path:
    """The pipeline's consistency LoRA: a folder with ``pytorch_lora_weights.safetensors``."""
    return _WEIGHTS / "consistency_lora"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'prompts')}"), name)
