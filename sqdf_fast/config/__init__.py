"""The settings of a run: schema, presets and layers."""

from __future__ import annotations

from sqdf_fast.config.algorithms import ALGORITHM_SETTINGS, section_of
from sqdf_fast.config.layers import (
    current_names,
    dump_config,
    given_settings,
    make_config,
    parse_assignments,
    read_config_file,
    refuse_without_effect,
    settings_of,
    with_settings,
)
from sqdf_fast.config.old_keys import OLD_KEYS
from sqdf_fast.config.presets import PRESETS, default_preset, preset_for
from sqdf_fast.config.schema import (
    Config,
    Execution,
    Limits,
    Objective,
    Optimizer,
    without_effect,
)
from sqdf_fast.config.section import Section, describe_settings, dotted, setting_names, validate

__all__ = [
    "ALGORITHM_SETTINGS",
    "OLD_KEYS",
    "PRESETS",
    "Config",
    "Execution",
    "Limits",
    "Objective",
    "Optimizer",
    "Section",
    "current_names",
    "default_preset",
    "describe_settings",
    "dotted",
    "dump_config",
    "given_settings",
    "make_config",
    "parse_assignments",
    "preset_for",
    "read_config_file",
    "refuse_without_effect",
    "section_of",
    "setting_names",
    "settings_of",
    "validate",
    "with_settings",
    "without_effect",
]
