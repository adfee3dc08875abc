"""Checkpoints: one folder each, written atomically and verified when read back."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.files import atomic_folder

_TENSORS, _VALUES = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write ``folder/step_{step}`` atomically and drop all but the newest ``keep`` checkpoints.

    Args:
        tensors: any names and dtypes.
        values: JSON values.

    Raises:
        UserError: the disk refuses; existing checkpoints are untouched.
    """
    path = folder / f"step_{step:06d}"
    with atomic_folder(path) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / _TENSORS)
        record = {**values, "step": step, "sha256": _sha256(partial / _TENSORS)}
        (partial / _VALUES).write_text(json.dumps(record), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step_\d{6,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step a checkpoint was taken after."""
    return int(path.name.removeprefix("step_"))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of one checkpoint.

    Raises:
        UserError: a file is missing, unreadable or altered.
    """
    try:
        values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        if _sha256(path / _TENSORS) != values.pop("sha256"):
            raise ValueError("the tensors are not those that were saved")
        return load_file(path / _TENSORS), values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged ({reason}); delete that folder to resume from the one before it"
        ) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
