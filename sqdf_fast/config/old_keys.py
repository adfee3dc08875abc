"""Names of settings in earlier versions, for existing configuration files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from sqdf_fast.config.algorithms import readers

OLD_KEYS: dict[str, tuple[str, ...]] = {
    "execution.residency": ("execution.offload",),
    "execution.recompute": ("execution.gradient_checkpointing",),
    "execution.forward_rows": ("execution.forward_batch_rows",),
    "execution.network_rows": ("execution.backward_batch_rows",),
    "baseline.truncation": ("draft.truncation", "draft_kl.truncation"),
    "baseline.noises": ("draft_lv.noises",),
    "baseline.window": ("refl.window",),
    "baseline.margin": ("refl.margin",),
    "baseline.group": ("ddpo.group", "dpok.group", "awm.group"),
    "baseline.timesteps": ("ddpo.timesteps", "dpok.timesteps", "awm.timesteps"),
    "baseline.clip_range": ("ddpo.clip_range", "dpok.clip_range"),
    "baseline.clip_advantage": ("ddpo.clip_advantage", "dpok.clip_advantage", "awm.clip_advantage"),
    "baseline.matching": ("awm.matching",),
    "baseline.clip_matching": ("awm.clip_range",),
}
"""Old key to its new ones: a setting that several algorithms shared is now one of each of them."""

_OLD_VALUES = {"execution.residency": {"resident": "none"}}

_log = logging.getLogger(__name__)


def with_new_names(settings: Mapping[str, Any], algorithm: str | None = None) -> dict[str, Any]:
    """Nested settings with every old key under its new name, each announced once a process.

    Args:
        algorithm: reader of the settings: of several new keys, those that it reads are set. None: all of them.
    """
    renamed = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for old, new in OLD_KEYS.items():
        section, _, name = old.partition(".")
        if not isinstance(renamed.get(section), dict) or name not in renamed[section]:
            continue
        value = renamed[section].pop(name)
        if isinstance(value, str):
            value = _OLD_VALUES.get(old, {}).get(value, value)
        for key in [key for key in new if algorithm in readers(key)] or new:
            its_section, _, its_name = key.partition(".")
            values = renamed.setdefault(its_section, {})
            if isinstance(values, dict):
                values.setdefault(its_name, value)
        _announce(old)
    if renamed.get("baseline") == {}:
        del renamed["baseline"]
    return renamed


@functools.cache
def _announce(old: str) -> None:
    *first, last = OLD_KEYS[old]
    _log.warning("setting %s is now %s", old, f"{', '.join(first)} or {last}" if first else last)
