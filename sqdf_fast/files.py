"""Files that are written whole or not at all, and a disk that refuses, told in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sqdf_fast.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises inside the block into a UserError that names ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another folder") from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of ``path`` when the block ends well and vanishes otherwise.

    Raises:
        UserError: the disk refuses.
    """
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    try:
        with disk_errors(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                _sync(file)
            if path.exists():
                # Moved aside first: at no moment is there neither the old nor the new one on the disk.
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(partial, path)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, whole or not at all. Raises UserError when the disk refuses."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
