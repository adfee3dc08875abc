"""Rewards by name: one table, which also takes the user's own ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from sqdf_fast.errors import UserError, did_you_mean
from sqdf_fast.rewards.base import FunctionReward, Reward
from sqdf_fast.rewards.catalogue import CATALOGUE
from sqdf_fast.rewards.weighted import WeightedSum, is_sum, options_of, parse_sum


def available_rewards() -> tuple[str, ...]:
    """Names that :func:`load_reward` knows beside ``module:function``."""
    return tuple(CATALOGUE)


def load_reward(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Reward:
    """A frozen reward on ``device``.

    Args:
        spec: registered name; ``module:attribute``, a function ``(images, prompts) -> [B]`` or a subclass of
            :class:`Reward`, in the current folder too; or a weighted sum of such, ``aesthetic*1.0 + clip*0.5``.
        dtype: dtype of the networks of rewards that take a ``dtype``.
        options: keywords of the reward's class method ``load``, or else of its constructor (of the function, at each
            call); in a sum, with the reward's name and a dot before them, ``clip.model``.

    Raises:
        UserError: an unknown name, module or attribute, options that do not fit, an invalid sum, or a constructor
            that raises.
    """
    if is_sum(spec):
        terms = parse_sum(spec)
        own = zip(terms, options_of(terms, options), strict=True)
        parts = [load_reward(term.name, device=device, dtype=dtype, **given) for term, given in own]
        return WeightedSum(spec, parts, [term.weight for term in terms]).eval().requires_grad_(False)
    target = find_reward(spec)
    if inspect.isclass(target) and issubclass(target, Reward):
        constructor = _class_method(target, "load") or target
        if "dtype" in inspect.signature(constructor).parameters:
            options["dtype"] = dtype
        _check_options(spec, constructor, (), options)
        reward = _make(spec, constructor, options)
    elif callable(target) and not inspect.isclass(target):
        _check_options(spec, target, ("images", "prompts"), options)
        reward = FunctionReward(target, spec, options)
    else:
        raise UserError(
            f"reward {spec!r} is neither a function nor a subclass of sqdf_fast.rewards.Reward; "
            "write a function (images, prompts) -> scores"
        )
    return reward.to(device).eval().requires_grad_(False)


def reward_from_config(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """A reward's modules with random weights, for simulation: nothing is read but the package itself.

    Its forward has no branch on values, so that it runs on fake tensors; its scores mean nothing.

    Args:
        name: registered name, ``module:Class`` of a subclass of :class:`Reward` with ``from_config``, or a weighted
            sum of such.
        device: device of the weights; ``meta`` needs no memory.

    Raises:
        UserError: an unknown name, or a reward whose memory cannot be known without running it.
    """
    if is_sum(name):
        terms = parse_sum(name)
        parts = [reward_from_config(term.name, device=device, dtype=dtype) for term in terms]
        return WeightedSum(name, parts, [term.weight for term in terms]).eval().requires_grad_(False)
    target = find_reward(name)
    if from_config := _class_method(target, "from_config"):
        reward = _make(name, from_config, {"device": device, "dtype": dtype})
    elif name in CATALOGUE and CATALOGUE[name].differentiable:
        # An analytic function of the pixels: it has no weights.
        reward = FunctionReward(target, name, {})
    else:
        known = [registered for registered, card in CATALOGUE.items() if card.differentiable]
        raise UserError(
            f"reward {name!r} cannot be simulated: what it keeps in memory is not known without running it; plan with "
            f"one of similar size ({', '.join(known)}), or give your subclass of Reward a class method from_config"
        )
    return reward.eval().requires_grad_(False)


def find_reward(spec: str) -> Any:
    """The function or class that ``spec`` names, not a sum; no weights are read. Raises UserError if unknown."""
    if spec in CATALOGUE:
        return import_attribute(CATALOGUE[spec].address)
    if ":" in spec:
        return import_attribute(spec)
    raise UserError(
        f"reward {spec!r} is unknown; {did_you_mean(spec, CATALOGUE)}allowed: {', '.join(CATALOGUE)}, module:function "
        "of your own, or a sum such as aesthetic*1.0 + clip*0.5"
    )


def _class_method(target: Any, name: str) -> Callable[..., Reward] | None:
    method = getattr(target, name, None)
    return method if inspect.isclass(target) and inspect.ismethod(method) else None


def _make(spec: str, constructor: Callable[..., Reward], options: dict[str, Any]) -> Reward:
    try:
        return constructor(**options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"reward {spec!r} cannot be made ({type(error).__name__}: {error})") from error


def import_attribute(address: str, kind: str = "reward") -> Any:
    """``module:attribute``, from the current folder if it is not installed; ``kind`` is for messages.

    Raises:
        UserError: a module that cannot be imported, or one without the attribute.
    """
    name, _, attribute = address.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"{kind} module {name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"put {name.replace('.', '/')}.py in the current folder or install it"
        ) from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(attribute, names).strip() or "check the name after the colon"
        raise UserError(f"{kind} {address!r}: module {name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


def _check_options(spec: str, target: Any, positional: tuple[str, ...], options: dict[str, Any]) -> None:
    try:
        inspect.signature(target).bind(*positional, **options)
    except TypeError as error:
        given = ", ".join(options) or "none"
        raise UserError(
            f"reward {spec!r}: {error}; options given: {given}; it takes {inspect.signature(target)}"
        ) from None
