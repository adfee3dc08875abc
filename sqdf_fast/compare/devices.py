"""What a run computes on: one of the GPUs here, and a share of the CPU's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import takewhile

from sqdf_fast.engine.gpu_memory import open_driver


@dataclass(frozen=True)
class DeviceSlot:
    """The devices of one of the runs that are under way.

    Attributes:
        gpu: value of CUDA_VISIBLE_DEVICES; None: as in this process.
        threads: value of OMP_NUM_THREADS; None: as in this process.
    """

    gpu: str | None = None
    threads: int | None = None


def device_slots(jobs: int | None, device: str) -> list[DeviceSlot]:
    """A slot per run: GPUs in turn, or the CPU's cores divided among them.

    Args:
        jobs: number of runs at a time; None: one per GPU, one on the CPU.
        device: setting `device` of the runs.
    """
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    number = jobs or max(1, len(gpus))
    # OMP_NUM_THREADS, where it is set, is the user's own decision.
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // number)
    return [DeviceSlot(gpus[index % len(gpus)] if len(gpus) > 1 else None, threads) for index in range(number)]


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that show one GPU each.

    By the driver's library: asking CUDA would create a context, in memory that the runs need.
    """
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
    # CUDA sees none behind the first that does not exist; names such as GPU-UUID and MIG-UUID are left to it.
    names = [name.strip() for name in named.split(",")]
    return list(takewhile(lambda name: name and (not name.lstrip("-").isdigit() or 0 <= int(name) < count), names))
