"""The devices of a run: one of the local GPUs, and a share of the CPU cores."""

from __future__ import annotations

import os
from itertools import takewhile
from typing import NamedTuple

from sqdf_fast.engine.gpu_memory import open_driver


class DeviceSlot(NamedTuple):
    """Values of CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS for a run; None: as in this process."""

    gpu: str | None = None
    threads: int | None = None


def device_slots(jobs: int | None, device: str) -> list[DeviceSlot]:
    """A slot per concurrent run: GPUs in turn, or an equal share of the CPU cores.

    Args:
        jobs: number of concurrent runs; None: one per GPU, one on the CPU.
        device: setting `device` of the runs.
    """
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    number = jobs or max(1, len(gpus))
    # The user's own OMP_NUM_THREADS wins.
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // number)
    return [DeviceSlot(gpus[index % len(gpus)] if len(gpus) > 1 else None, threads) for index in range(number)]


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that show one GPU each, by NVML: CUDA would create a context in GPU memory."""
    nvml = open_driver()
    if isinstance(nvml, str):
        return []
    try:
        count = nvml.nvmlDeviceGetCount()
    finally:
        nvml.nvmlShutdown()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(count)]
    # CUDA ignores all devices after the first invalid index; it resolves names such as GPU-UUID and MIG-UUID itself.
    names = [name.strip() for name in named.split(",")]
    return list(takewhile(lambda name: name and (not name.lstrip("-").isdigit() or 0 <= int(name) < count), names))
