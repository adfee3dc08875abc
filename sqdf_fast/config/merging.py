"""Layers of nested settings and dotted keys, by OmegaConf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sqdf_fast.errors import UserError


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later layers over earlier ones: mappings are merged, everything else is replaced.

    Raises:
        UserError: layers that do not go together.
    """
    try:
        # The trees are made here and read nowhere else, so nothing has to be copied.
        return _plain(OmegaConf.unsafe_merge(_tree({}), *(_tree(layer) for layer in layers if layer)))
    except (OmegaConfBaseException, TypeError) as error:
        raise _refusal(error) from None


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as nested settings; of keys that overlap the later one wins. Raises as :func:`merge`."""
    try:
        tree = _tree({})
        for key, value in settings.items():
            OmegaConf.update(tree, key, value)
        return _plain(tree)
    except (OmegaConfBaseException, TypeError) as error:
        raise _refusal(error) from None


def _tree(settings: Mapping[str, Any]) -> DictConfig:
    # Values that are no settings at all are refused with the setting's name, once the whole is validated.
    return OmegaConf.create(dict(settings), flags={"allow_objects": True})


def _plain(tree: Any) -> dict[str, Any]:
    # Without resolve a text with ${} stays that text.
    return cast(dict[str, Any], OmegaConf.to_container(tree))


def _refusal(error: Exception) -> UserError:
    return UserError(f"these settings do not go together: {str(error).splitlines()[0]}")
