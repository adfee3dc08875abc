"""The configuration that a command line asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqdf_fast.config import Config, default_preset, given_settings, make_config, parse_assignments, read_config_file

# Flags whose setting is in a section.
_FLAGS = {"alpha": ("objective", "alpha"), "gamma": ("objective", "gamma"), "policy": ("policy", "base")}

_log = logging.getLogger(__name__)


def read_settings(
    flags: Mapping[str, Any], file: Path | None, assignments: Sequence[str]
) -> tuple[Config, tuple[str, ...]]:
    """The configuration, and the dotted keys that the user set.

    Args:
        flags: option names to values; None: not given.
        file: YAML file of settings; assignments: ``KEY=VALUE`` each.

    Raises:
        UserError: one line that names the key, the value and what is allowed.
    """
    given = _nested_flags(flags)
    layers = (read_config_file(file) if file else {}, parse_assignments(assignments), given)
    preset = preset_for(*layers)
    return make_config(preset, *layers), given_settings(*layers)


def preset_for(file: Mapping[str, Any], assignments: Mapping[str, Any], flags: Mapping[str, Any]) -> str | None:
    """The preset that the settings start from where they name none; None where they name one or need none."""
    layers = (flags, file, assignments)
    if "objective" in file or any("preset" in layer for layer in layers):
        return None
    models = [layer["model"] for layer in layers if "model" in layer]
    if models:
        return default_preset(models[0])
    import torch

    if torch.cuda.is_available():
        return "aesthetic"
    _log.warning("No CUDA GPU and no --model: training the embedded shapes model on the CPU.")
    return "shapes"


def _nested_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        if name in _FLAGS:
            section, key = _FLAGS[name]
            nested.setdefault(section, {})[key] = value
        else:
            nested[name] = value
    return nested
