"""Prompt sets, by name or from a text file."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from sqdf_fast.errors import UserError, did_you_mean


def _shapes(name: str) -> list[str]:
    return list(getattr(import_module("sqdf_fast.shapes.prompts"), name))


_NAMED: dict[str, Callable[[], list[str]]] = {
    "animals": lambda: read_prompts(Path(__file__).parent / "animals.txt"),
    "shapes": lambda: _shapes("TRAIN_PROMPTS"),
    "shapes-held-out": lambda: _shapes("HELD_OUT_PROMPTS"),
}


def available_prompts() -> tuple[str, ...]:
    """Names that :func:`load_prompts` knows."""
    return tuple(_NAMED)


def load_prompts(name_or_path: str | Path) -> list[str]:
    """The prompts of a named set, or of a text file.

    Raises:
        UserError: an unknown name, or a file that :func:`read_prompts` refuses.
    """
    name = str(name_or_path)
    if name in _NAMED:
        return _NAMED[name]()
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path):
        return read_prompts(Path(path))
    raise UserError(
        f"prompts {name!r}: neither a file nor a named set; {did_you_mean(name, _NAMED)}named sets: "
        f"{', '.join(_NAMED)}; "
        "or give a UTF-8 text file with one prompt a line"
    )


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, in order, repetitions kept. Blank lines and lines that start with '#' are skipped.

    Raises:
        UserError: a file that is missing, not UTF-8, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    except OSError as error:
        raise UserError(
            f"prompt file {path}: cannot be read ({error.strerror}); give a text file with one prompt a line"
        ) from None
    lines = (line.strip() for line in text.splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompt file {path}: holds no prompt; write one prompt a line")
    return prompts
