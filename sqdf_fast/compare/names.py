"""Look-up of everything a comparison names before its first run: a mistake would fail every run in turn."""

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
    """Look up device, model, prompts, rewards and judges, without reading weights.

    Args:
        config: shared settings of all methods.
        followers: methods that follow the reward's gradient.

    Raises:
        UserError: one of them is missing, or the reward is known to have no gradient.
    """
    gpus = len(visible_gpus())
    # Asking torch about a GPU would create a CUDA context, whose memory the runs need.
    if config.device not in ("auto", *("cuda",) * (gpus > 0), *(f"cuda:{index}" for index in range(gpus))):
        pick_device(config.device)
    refuse_unknown_model(config.model)
    load_prompts(config.prompts)
    if config.evaluation.prompts is not None:
        load_prompts(config.evaluation.prompts)
    for judge in config.evaluation.judges:
        find_judge(judge)
    for spec in config.evaluation.held_out:
        _rewards(spec)
    blind = [name for name, found in _rewards(config.reward).items() if not getattr(found, "differentiable", True)]
    if blind and followers:
        raise UserError(
            f"reward {' and '.join(map(repr, blind))} has no gradient for {', '.join(followers)} to follow; choose "
            "among the methods ddpo, dpok, awm and best-of-n, which need no gradient"
        )


def _rewards(spec: str) -> dict[str, Any]:
    """The functions or classes of a reward, or of the terms of a sum, by name."""
    names = [term.name for term in parse_sum(spec)] if is_sum(spec) else [spec]
    return {name: find_reward(name) for name in names}
