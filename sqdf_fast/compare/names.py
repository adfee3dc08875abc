"""What a comparison names is looked up before its first run: every run would fail by the same mistake in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqdf_fast.compare.devices import visible_gpus
from sqdf_fast.config import Config
from sqdf_fast.engine.loading import pick_device
from sqdf_fast.errors import UserError
from sqdf_fast.evaluate.judges import find_judge
from sqdf_fast.families import refuse_unknown_model
from sqdf_fast.prompts import load_prompts
from sqdf_fast.rewards.registry import find_reward
from sqdf_fast.rewards.weighted import is_sum, parse_sum


def look_up(config: Config, followers: Sequence[str]) -> None:
    """Look up device, model, prompts, rewards and judges. No weights are read.

    Args:
        config: what all methods share.
        followers: names of the methods that follow the reward's gradient.

    Raises:
        UserError: one of them is missing, or the reward is known to have no gradient.
    """
    _look_up_device(config.device)
    refuse_unknown_model(config.model)
    load_prompts(config.prompts)
    evaluation = config.evaluation
    if evaluation.prompts is not None:
        load_prompts(evaluation.prompts)
    for judge in evaluation.judges:
        find_judge(judge)
    for spec in evaluation.held_out:
        _rewards(spec)
    blind = [name for name, found in _rewards(config.reward).items() if not getattr(found, "differentiable", True)]
    if blind and followers:
        raise UserError(
            f"reward {' and '.join(map(repr, blind))} has no gradient for {', '.join(followers)} to follow; choose "
            "among the methods ddpo, dpok, awm and best-of-n, which need none"
        )


def _rewards(spec: str) -> dict[str, Any]:
    """Functions and classes of a reward, or of the parts of a sum, by name."""
    names = [term.name for term in parse_sum(spec)] if is_sum(spec) else [spec]
    return {name: find_reward(name) for name in names}


def _look_up_device(name: str) -> None:
    gpus = len(visible_gpus())
    # A GPU is left alone: a CUDA context of this process would take memory from the runs.
    if name not in ("auto", *("cuda",) * (gpus > 0), *(f"cuda:{index}" for index in range(gpus))):
        pick_device(name)
