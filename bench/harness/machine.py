"""The devices that are measured, and what a recorded result says about the machine: hardware and versions alone.

Nothing in it identifies the machine. `python bench machine` prints it as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sqdf_fast.commands.doctor import facts
from sqdf_fast.errors import UserError


def devices(choice: str) -> list[str]:
    """The devices to measure; "all" is the CPU, and CUDA on a machine with a GPU.

    Raises:
        UserError: the machine does not have this device.
    """
    found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if choice == "all":
        return found
    if choice not in found:
        raise UserError(f"no device {choice} on this machine: choose one of all, {', '.join(found)}")
    return [choice]


def machine_info() -> dict[str, Any]:
    """CPU, caches, threads, GPU, driver and versions."""
    found = facts()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": found.cpu,
        "cores": found.cores,
        "caches": caches(),
        "torch_threads": found.torch_threads,
        "native": found.native,
        "gpu": found.gpus[0].name if found.gpus else None,
        "gpu_memory_gib": round(found.gpus[0].memory / 2**30, 1) if found.gpus else None,
        "compute_capability": ".".join(map(str, found.gpus[0].capability)) if found.gpus else None,
        "driver": found.gpus[0].driver if found.gpus else None,
        "cuda": found.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "pytest-benchmark", "sqdf-fast")},
    }


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, str]:
    """Sizes of the first core's caches by name, such as {"L1 Data": "32K", "L3 Unified": "32768K"}."""
    found = {}
    for entry in sorted(folder.glob("index*")):
        level, kind, size = ((entry / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def last_level(sizes: dict[str, str]) -> tuple[str, int] | None:
    """Name and bytes of the last of `caches()`, None if they are unknown; a virtual machine may see its host's."""
    if not sizes:
        return None
    name = max(sizes)  # "L3 Unified" comes after "L2 Unified"
    return name, int(sizes[name].removesuffix("K")) * 1024


def device_name(info: dict[str, Any], device: str) -> str:
    """The name of a device's file of results, such as "cpu-amd-epyc-2-cores"."""
    text = info["gpu"] if device == "cuda" else f"cpu {info['cpu']} {info['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench machine", description="Hardware and versions as JSON.")
    parser.parse_args(arguments)
    print(json.dumps(machine_info()))
