"""From layers of settings to a validated configuration, and back to YAML.

Layers, later ones win: defaults of the fields < preset < file < ``--set key=value`` < flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sqdf_fast.config.merging import merge, nested
from sqdf_fast.config.old_keys import OLD_KEYS, with_new_names
from sqdf_fast.config.presets import CONSISTENCY_SAMPLING, PRESETS
from sqdf_fast.config.schema import Config, without_effect
from sqdf_fast.config.section import Section, dotted, validate
from sqdf_fast.errors import UserError

# In every run's config.yaml since version 0.1.0; no file written by hand has all of them.
_OF_A_RUN = frozenset(
    {
        *("preset", "model", "vram", "resolution", "reward", "reward_options", "algorithm", "prompts"),
        *("consistency_lora", "steps", "seed", "device", "dtype", "impl", "checkpoint_every"),
    }
)


def make_config(
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    assignments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge the layers and validate. The flag policy.base = consistency also sets few steps without guidance.

    Raises:
        UserError: one line that names the key, the value and what is allowed; a given setting that the run would not
            read is refused too, unless it comes from a preset or from the config.yaml of a run.
    """
    layers = _current(file, assignments, flags)
    for layer in layers:
        preset = layer.get("preset") or preset
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise UserError(f"preset {preset!r} is unknown; allowed: {', '.join(sorted(PRESETS))}")
    named = {} if preset is None else {**PRESETS[preset], "preset": preset}
    few_steps = (layers[-1].get("policy") or {}).get("base") == "consistency"
    config = _validated(merge(named, CONSISTENCY_SAMPLING if few_steps else {}, *layers))
    refuse_without_effect(given_settings(*layers), config)
    return config


def with_settings(config: Config, settings: Mapping[str, Any], *, shared: bool = False) -> Config:
    """The configuration with these dotted keys changed, validated again.

    Args:
        shared: whether the settings are for runs of several algorithms, so that this one need not read them all.

    Raises:
        UserError: as :func:`make_config`.
    """
    algorithm = settings.get("algorithm", config.algorithm)
    given = with_new_names(nested(settings), None if shared else algorithm)
    changed = _validated(merge(config.model_dump(mode="json"), given))
    if not shared:
        refuse_without_effect(dotted(given), changed)
    return changed


def refuse_without_effect(given: Iterable[str], *configs: Config) -> None:
    """Raises UserError for the first of these dotted keys that none of the configurations reads."""
    idle = [without_effect(config) for config in configs]
    for key in given:
        if all(new in reasons for reasons in idle for new in OLD_KEYS.get(key, (key,))):
            name = OLD_KEYS.get(key, (key,))[0]
            raise UserError(f"setting {key} has no effect with {idle[0][name]}; leave it out")


def given_settings(
    file: Mapping[str, Any] | None = None,
    assignments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Dotted keys that the layers of `make_config` set themselves: what a plan keeps.

    A run's config.yaml does not count: it does not say which of its settings were planned.
    """
    layers = _current(file, assignments, flags)
    layers = layers[1:] if layers[0].keys() >= _OF_A_RUN else layers
    return tuple(dict.fromkeys(key for layer in layers for key in dotted(layer)))


def settings_of(config: Config) -> dict[str, Any]:
    """Nested settings, plain values: those that a run of this configuration reads."""
    idle = without_effect(config)
    values: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if not isinstance(getattr(config, name), Section):
            values[name] = value
        elif read := {key: item for key, item in value.items() if f"{name}.{key}" not in idle}:
            values[name] = read
    return values


def dump_config(config: Config) -> str:
    """What a run of this configuration reads, as YAML that :func:`read_config_file` reads back."""
    return yaml.safe_dump(settings_of(config), sort_keys=False)


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, each old key under its new name."""
    return dotted(with_new_names(nested(settings)))


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["objective.alpha=2", ...]`` as a nested dictionary; values are YAML scalars or lists.

    Raises UserError for a missing '=' and for a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment}: expected key=value, e.g. --set objective.alpha=2")
        try:
            settings = merge(settings, nested({key: parse_yaml(text)}))
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: invalid YAML value; quote it if it contains ':' or '['") from None
    return settings


def read_config_file(path: Path) -> dict[str, Any]:
    """A YAML file as a nested dictionary. Raises UserError when it is missing or is not a mapping."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"configuration file {path}: invalid YAML{line}; see a run's config.yaml") from None
    if not isinstance(data, dict):
        raise UserError(f"configuration file {path}: expected a mapping of settings; see a run's config.yaml")
    return data


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1, except that 1e-3, without a dot, is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _current(*layers: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The layers under the settings' present names."""
    algorithm = Config.model_fields["algorithm"].default
    for layer in layers:
        algorithm = (layer or {}).get("algorithm", algorithm)
    return [with_new_names(layer or {}, algorithm) for layer in layers]


def _validated(values: Mapping[str, Any]) -> Config:
    config = validate(Config, values)
    if config.reads("objective.lookahead") or config.policy.base == "consistency":
        return config
    # Without a look-ahead no consistency model is loaded.
    objective = config.objective.model_copy(update={"lookahead": "tweedie"})
    return config.model_copy(update={"objective": objective})
