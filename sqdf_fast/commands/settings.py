"""The configuration of a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqdf_fast.config import Config, given_settings, make_config, parse_assignments, preset_for, read_config_file

# Flags whose setting is in a section.
_FLAGS = {"alpha": ("objective", "alpha"), "gamma": ("objective", "gamma"), "policy": ("policy", "base")}


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
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None and name in _FLAGS:
            section, key = _FLAGS[name]
            nested.setdefault(section, {})[key] = value
        elif value is not None:
            nested[name] = value
    layers = (read_config_file(file) if file else {}, parse_assignments(assignments), nested)
    return make_config(preset_for(*layers), *layers), given_settings(*layers)
