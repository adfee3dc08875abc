"""Methods as named settings on top of the shared ones, and the variants of an ablation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from sqdf_fast.config import Config, with_settings
from sqdf_fast.errors import UserError

Settings = dict[str, Any]

# Methods that train nothing must neither load nor need a consistency model.
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

# Methods without training and the values of their curves; the first value is plain sampling.
TRAINING_FREE: dict[str, tuple[float, ...]] = {
    "best-of-n": (1, 2, 4, 8),
    "guided": (0.0, 1.0, 4.0, 16.0),
}

# Settings that must be equal for figures to be comparable, and those that the comparison decides.
SHARED = frozenset(
    {
        *("model", "preset", "reward", "reward_options", "prompts", "resolution", "device", "dtype", "seed", "steps"),
        *("limits", "evaluation", "monitor", "checkpoint_every"),
    }
)

_LOOKAHEADS: dict[str, Settings] = {
    "lookahead-tweedie": {"objective.lookahead": "tweedie"},
    "lookahead-deterministic-2": {"objective.lookahead": "deterministic", "objective.lookahead_steps": 2},
    "lookahead-deterministic-4": {"objective.lookahead": "deterministic", "objective.lookahead_steps": 4},
    # It has no steps of its own: the base's number stays, so that this can be the base itself.
    "lookahead-consistency": {"objective.lookahead": "consistency"},
}


def _alphas(config: Config) -> dict[str, Settings]:
    alpha = config.objective.alpha
    scaled = {f"alpha-x{factor:g}": {"objective.alpha": alpha * factor} for factor in (0.25, 1.0, 4.0)}
    return {"alpha-0": {"objective.alpha": 0.0}, **scaled}


ABLATIONS: dict[str, Callable[[Config], dict[str, Settings]]] = {
    "gamma": lambda config: {f"gamma-{gamma:g}": {"objective.gamma": gamma} for gamma in (1.0, 0.95, 0.9, 0.85)},
    "credit": lambda config: {f"credit-{kind}": {"objective.credit": kind} for kind in ("discount", "posterior")},
    "lookahead": lambda config: dict(_LOOKAHEADS),
    "buffer": lambda config: {
        f"buffer-{mode}": {"replay.mode": mode} for mode in ("uniform", "prioritised", "on-policy")
    },
    "replay-ratio": lambda config: {f"replay-ratio-{n}": {"replay.steps_per_refill": n} for n in (1, 4, 8)},
    "alpha": _alphas,
}


def builtin(name: str, base: str = "network") -> Settings:
    """The settings of a built-in method. Raises UserError for an unknown name.

    Args:
        base: shared setting ``policy.base``; a consistency model looks ahead by itself even where nothing is trained.
    """
    if name not in METHODS and name not in TRAINING_FREE:
        close = difflib.get_close_matches(name, [*METHODS, *TRAINING_FREE], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join([*METHODS, *TRAINING_FREE])
        raise UserError(f"method {name!r} is unknown; {hint}known: {known}; a protocol file may define others")
    training_free = _BLIND if base == "network" else {}
    return dict(METHODS.get(name, training_free))


def method_config(base: Config, name: str, settings: Mapping[str, Any]) -> Config:
    """``base`` with a method's settings. Raises UserError for one that is unknown, not allowed or shared."""
    for key in settings:
        if key.partition(".")[0] in SHARED:
            raise UserError(
                f"method {name!r} sets {key}, which must be equal for all methods; set it for all of them (--set, or "
                "settings of the protocol)"
            )
    try:
        return with_settings(base, settings)
    except UserError as error:
        raise UserError(f"method {name!r}: {error}") from None


def ablation(axis: str, config: Config) -> dict[str, Settings]:
    """Changed settings by variant; one variant may equal ``config``. Raises UserError for an unknown axis."""
    if axis not in ABLATIONS:
        raise UserError(f"--ablate {axis}: unknown; allowed: {', '.join(ABLATIONS)}")
    return ABLATIONS[axis](config)
