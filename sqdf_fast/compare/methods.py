"""What is compared: named settings on top of those that all methods share, and the variants of an ablation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from sqdf_fast.algorithms import ALGORITHMS
from sqdf_fast.config import Config, with_settings
from sqdf_fast.errors import UserError

Settings = dict[str, Any]

# What trains nothing looks ahead by no consistency model: it must neither load nor need one.
_BLIND: Settings = {"objective.lookahead": "tweedie"}

# A consistency model's own way of sampling.
_FEW_STEPS: Settings = {"sampling.num_inference_steps": 4, "sampling.guidance_scale": 1.0}

# A collection serves one update: a preset's replay ratio is SQDF's.
_ON_POLICY: Settings = {"replay.steps_per_refill": 1}

METHODS: dict[str, Settings] = {
    "sqdf": {"algorithm": "sqdf"},
    "sqdf-consistency": {"algorithm": "sqdf", "policy.base": "consistency", **_FEW_STEPS},
    "draft-1": {"algorithm": "draft", "draft.truncation": 1},
    "draft-k": {"algorithm": "draft", "draft.truncation": 5},
    "draft-lv": {"algorithm": "draft-lv"},
    "refl": {"algorithm": "refl"},
    # More than the last step, which adds next to no noise and then has no KL.
    "draft-kl": {"algorithm": "draft-kl", "draft_kl.truncation": 5},
    "ddpo": {**_ON_POLICY, "algorithm": "ddpo"},
    "dpok": {**_ON_POLICY, "algorithm": "dpok"},
    "awm": {**_ON_POLICY, "algorithm": "awm"},
}

# Methods that train nothing, with the values that make their curve; the first value is plain sampling.
TRAINING_FREE: dict[str, tuple[float, ...]] = {
    "best-of-n": (1, 2, 4, 8),
    "guided": (0.0, 1.0, 4.0, 16.0),
}

# What has to be alike for figures to be comparable, and what the comparison itself decides.
SHARED = (
    "model",
    "preset",
    "reward",
    "reward_options",
    "prompts",
    "resolution",
    "device",
    "dtype",
    "seed",
    "steps",
    "limits",
    "evaluation",
    "monitor",
    "checkpoint_every",
)


def _lookaheads(config: Config) -> dict[str, Settings]:
    found: dict[str, Settings] = {"lookahead-tweedie": {"objective.lookahead": "tweedie"}}
    for steps in (2, 4):
        found[f"lookahead-deterministic-{steps}"] = {
            "objective.lookahead": "deterministic",
            "objective.lookahead_steps": steps,
        }
    # The number of steps is the base's: it means nothing here, and the variant is then the base itself.
    found["lookahead-consistency"] = {"objective.lookahead": "consistency"}
    return found


def _alphas(config: Config) -> dict[str, Settings]:
    alpha = config.objective.alpha
    scaled = {f"alpha-x{factor:g}": {"objective.alpha": alpha * factor} for factor in (0.25, 1.0, 4.0)}
    return {"alpha-0": {"objective.alpha": 0.0}, **scaled}


ABLATIONS: dict[str, Callable[[Config], dict[str, Settings]]] = {
    "gamma": lambda config: {f"gamma-{gamma:g}": {"objective.gamma": gamma} for gamma in (1.0, 0.95, 0.9, 0.85)},
    "credit": lambda config: {f"credit-{kind}": {"objective.credit": kind} for kind in ("discount", "posterior")},
    "lookahead": _lookaheads,
    "buffer": lambda config: {
        f"buffer-{mode}": {"replay.mode": mode} for mode in ("uniform", "prioritised", "on-policy")
    },
    "replay-ratio": lambda config: {f"replay-ratio-{n}": {"replay.steps_per_refill": n} for n in (1, 4, 8)},
    "alpha": _alphas,
}


def builtin(name: str, base: str = "network") -> Settings:
    """The settings of a method of the table.

    Args:
        base: ``policy.base`` that all methods share; a consistency model looks ahead itself, training or not.

    Raises:
        UserError: an unknown name.
    """
    if name not in METHODS and name not in TRAINING_FREE:
        close = difflib.get_close_matches(name, [*METHODS, *TRAINING_FREE], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join([*METHODS, *TRAINING_FREE])
        raise UserError(f"method {name!r} is unknown; {hint}known: {known}; a protocol file may define others")
    training_free = _BLIND if base == "network" else {}
    return dict(METHODS.get(name, training_free))


def method_config(base: Config, name: str, settings: Mapping[str, Any]) -> Config:
    """``base`` with a method's settings.

    Raises:
        UserError: a setting that is unknown, not allowed, or has to be alike for all methods; an algorithm that this
            version does not have.
    """
    for key in settings:
        if key.partition(".")[0] in SHARED:
            raise UserError(
                f"method {name!r} sets {key}, which has to be alike for all methods; set it for all of them (--set, or "
                "settings of the protocol)"
            )
    try:
        config = with_settings(base, settings)
    except UserError as error:
        raise UserError(f"method {name!r}: {error}") from None
    if config.algorithm not in ALGORITHMS:
        raise UserError(
            f"method {name!r} needs the algorithm {config.algorithm}, which this version does not have; "
            f"it has: {', '.join(ALGORITHMS)}"
        )
    return config


def ablation(axis: str, config: Config) -> dict[str, Settings]:
    """The variants along one axis: name to what it changes. One of them may change nothing.

    Raises:
        UserError: an unknown axis.
    """
    if axis not in ABLATIONS:
        raise UserError(f"--ablate {axis}: unknown; allowed: {', '.join(ABLATIONS)}")
    return ABLATIONS[axis](config)
