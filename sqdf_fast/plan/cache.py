"""Simulated profiles and plans on disk: a plan that was made once is read, not searched."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import sqdf_fast
from sqdf_fast import __version__
from sqdf_fast.kernels import dispatch

Key = tuple[str, ...]


def folder() -> Path:
    """$XDG_CACHE_HOME/sqdf-fast/plans, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqdf-fast" / "plans"


def key_of(**inputs: Any) -> str:
    """One name for everything that decides a result, this package's code and PyTorch's version among it."""
    text = json.dumps({**inputs, "code": _code(), "torch": torch.__version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(key: str) -> dict[str, Any] | None:
    """What was stored under the key; None if nothing was, or it cannot be read."""
    try:
        found = json.loads((folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def write(key: str, values: dict[str, Any]) -> None:
    """Store; a disk that refuses costs the next search its time and nothing else."""
    target = folder() / f"{key}.json"
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**values, "key": key}), encoding="utf-8")
        temporary.replace(target)


def _code() -> str:
    """The whole package's: a list of what decides a plan would be forgotten where the code moves."""
    digest = hashlib.sha256(__version__.encode())
    for module in (sqdf_fast.__file__, dispatch.__file__):
        for path in sorted(Path(module).parent.rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
