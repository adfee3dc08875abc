"""Simulated profiles and plans on disk: a plan is searched once, then read."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter

import sqdf_fast
from sqdf_fast import __version__
from sqdf_fast.errors import UserError
from sqdf_fast.files import write_text
from sqdf_fast.kernels import dispatch

T = TypeVar("T")


def folder() -> Path:
    """$XDG_CACHE_HOME/sqdf-fast/plans, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sqdf-fast" / "plans"


def key_of(**inputs: Any) -> str:
    """A hash of the inputs, this package's code and PyTorch's version."""
    text = json.dumps({**inputs, "code": _code(), "torch": torch.__version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(key: str, kind: type[T]) -> T | None:
    """The dataclass stored under the key; None if there is none, or it cannot be read."""
    try:
        found = json.loads((folder() / f"{key}.json").read_text(encoding="utf-8"))
        if found.pop("key") != key:
            return None
        value: T = TypeAdapter(kind).validate_python(found)
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return value


def write(key: str, value: Any) -> None:
    """Store a dataclass; a disk that refuses costs the next search its time and nothing else."""
    with suppress(OSError, UserError):
        folder().mkdir(parents=True, exist_ok=True)
        write_text(folder() / f"{key}.json", json.dumps({**asdict(value), "key": key}))


def _code() -> str:
    """A hash of the whole package: a list of the modules that decide a plan would go out of date."""
    digest = hashlib.sha256(__version__.encode())
    for module in (sqdf_fast.__file__, dispatch.__file__):
        for path in sorted(Path(module).parent.rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
