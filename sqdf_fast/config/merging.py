"""Layers of nested settings and dotted keys, by OmegaConf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sqdf_fast.errors import UserError


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later layers over earlier ones: mappings are merged, everything else is replaced.

    Raises UserError for layers that cannot be merged.
    """
    with _one_line_errors():
        # The trees are made here and read nowhere else, so nothing has to be copied.
        return _plain(OmegaConf.unsafe_merge(_tree({}), *(_tree(layer) for layer in layers if layer)))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as nested settings; of keys that overlap the later one wins. Raises as :func:`merge`."""
    with _one_line_errors():
        tree = _tree({})
        for key, value in settings.items():
            OmegaConf.update(tree, key, value)
        return _plain(tree)


def _tree(settings: Mapping[str, Any]) -> DictConfig:
    # Objects pass: validation refuses them later with the setting's name.
    return OmegaConf.create(dict(settings), flags={"allow_objects": True})


def _plain(tree: Any) -> dict[str, Any]:
    # Without resolve a text with ${} stays that text.
    return cast(dict[str, Any], OmegaConf.to_container(tree))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"these settings cannot be combined: {str(error).splitlines()[0]}") from None
