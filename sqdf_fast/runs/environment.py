"""Versions and machine of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from sqdf_fast.files import disk_errors

FILE = "environment.json"
_PACKAGES = ("sqdf-fast", "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def environment() -> dict[str, str]:
    """Names and versions in display order."""
    import torch

    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["CPU cores"] = str(os.cpu_count())
    found["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["GPU"] = torch.cuda.get_device_name()
    return found


def write_environment(run_folder: Path) -> None:
    """Write :func:`environment` into the run folder. Raises UserError when the disk refuses."""
    path = run_folder / FILE
    with disk_errors(path):
        path.write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")
