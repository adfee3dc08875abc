"""Rewards by name: one table, which also takes the user's own ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from typing import Any

import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.base import FunctionReward, Reward

# The hidden rule of the embedded world is not here: it is what training must never see.
_REGISTERED = {
    "aesthetic": "sqdf_fast.rewards.aesthetic:AestheticReward",
    "jpeg": "sqdf_fast.rewards.jpeg:JpegCompressibility",
    "taste": "sqdf_fast.rewards.taste:TasteReward",
    "warmth": "sqdf_fast.shapes.rewards:warmth",
}


def available_rewards() -> tuple[str, ...]:
    """Names that :func:`load_reward` knows beside ``module:function``."""
    return tuple(_REGISTERED)


def load_reward(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Reward:
    """A frozen reward on ``device``.

    Args:
        spec: a registered name, or ``module:attribute``: a function ``(images, prompts) -> [B]`` or a
            subclass of :class:`Reward`. The module is looked for in the current folder too.
        dtype: given to rewards that take a ``dtype``, for their networks.
        options: keywords of the reward's constructor (of the function, at each call).

    Raises:
        UserError: an unknown name, a module or attribute that is not there, options that do not fit, or a
            constructor that raises.
    """
    if spec not in _REGISTERED and ":" not in spec:
        close = difflib.get_close_matches(spec, _REGISTERED, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"reward {spec!r} is unknown; {hint}allowed: {', '.join(_REGISTERED)}, or module:function of your own"
        )
    target = _resolve(_REGISTERED.get(spec, spec))
    if inspect.isclass(target) and issubclass(target, Reward):
        if "dtype" in inspect.signature(target).parameters:
            options["dtype"] = dtype
        _check_options(spec, target, (), options)
        reward = _make(spec, target, options)
    elif callable(target) and not inspect.isclass(target):
        _check_options(spec, target, ("images", "prompts"), options)
        reward = FunctionReward(target, spec, options)
    else:
        raise UserError(
            f"reward {spec!r} is neither a function nor a subclass of sqdf_fast.rewards.Reward; "
            "write a function (images, prompts) -> scores"
        )
    return reward.to(device).eval().requires_grad_(False)


def _make(spec: str, target: type[Reward], options: dict[str, Any]) -> Reward:
    try:
        return target(**options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"reward {spec!r} cannot be made ({type(error).__name__}: {error})") from error


def _resolve(address: str) -> Any:
    module_name, _, attribute = address.partition(":")
    module = _import(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "check the name after the colon"
        raise UserError(f"reward {address!r}: module {module_name} has no {attribute!r}; {hint}") from None


def _import(name: str) -> Any:
    """Import ``name``, from the current folder where it is not installed."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"reward module {name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"put {name.replace('.', '/')}.py in the current folder or install it"
        ) from error


def _check_options(spec: str, target: Any, positional: tuple[str, ...], options: dict[str, Any]) -> None:
    try:
        inspect.signature(target).bind(*positional, **options)
    except TypeError as error:
        given = ", ".join(options) or "none"
        raise UserError(
            f"reward {spec!r}: {error}; options given: {given}; it takes {inspect.signature(target)}"
        ) from None
