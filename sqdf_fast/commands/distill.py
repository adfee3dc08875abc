"""`sqdf-fast distill`: a consistency LoRA for a base model, and its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sqdf_fast.config import parse_assignments
from sqdf_fast.display import StageProgress
from sqdf_fast.distill import accuracy_table, distill, make_distillation
from sqdf_fast.engine.loading import pick_device, pick_dtype
from sqdf_fast.prompts import load_prompts
from sqdf_fast.rewards import checked_reward, load_reward


def make_lora(
    model: str,
    prompts: str,
    output: Path,
    *,
    preset: str | None = None,
    reward: str | None = None,
    device: str = "auto",
    assignments: Sequence[str] = (),
) -> str:
    """Distill ``model`` into a LoRA in the new folder ``output``; returns the table of its accuracy.

    Args:
        prompts: named set or file; preset: named settings, None: those of the model.
        reward: adds its correlation with the final image's reward to the table.
        assignments: ``KEY=VALUE`` each, settings of the distillation.

    Raises:
        UserError: bad input.
    """
    preset = preset or ("shapes" if model == "shapes" else "default")
    settings = make_distillation(preset, parse_assignments(assignments))
    where = pick_device(device)
    judge = load_reward(reward, device=where) if reward else None
    with StageProgress() as progress:
        summary = distill(
            model,
            load_prompts(prompts),
            output,
            settings,
            device=where,
            dtype=pick_dtype("auto", where),
            reward=None if judge is None else partial(checked_reward, judge),
            progress=progress,
        )
    return accuracy_table(summary["accuracy"])
