"""A run inside its memory budget: the GPU's memory, the share of other processes, and the cap.

The driver is queried through NVML (package nvidia-ml-py). Without it, or without its permission, a figure is None and a
reason is given.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from sqdf_fast.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU in bytes, now. None where it is not known, or where the device is a CPU.

    Attributes:
        total: usable by CUDA programs; free: the part that nobody has allocated.
        reserved: what this process's PyTorch has taken from the driver.
        others: allocated by other processes; processes: their number.
        reason: why ``others`` is not known.
    """

    device: torch.device
    total: int | None = None
    free: int | None = None
    reserved: int | None = None
    others: int | None = None
    processes: int | None = None
    reason: str | None = None

    @staticmethod
    def of(device: torch.device) -> DeviceMemory:
        """Query CUDA and the driver. Creates the CUDA context, as any first use of the GPU does."""
        if device.type != "cuda":
            return DeviceMemory(device, reason=f"{device} is not a GPU: its memory is the machine's own")
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        opened = open_gpu(device)
        if isinstance(opened, str):
            return DeviceMemory(device, total, free, reserved, reason=opened)
        nvml, handle = opened
        try:
            others, processes = _others(nvml, handle, reserved)
        except nvml.NVMLError as error:
            return DeviceMemory(device, total, free, reserved, reason=f"the driver refuses the query: {error}")
        finally:
            nvml.nvmlShutdown()
        return DeviceMemory(device, total, free, reserved, others, processes)

    @property
    def available(self) -> int | None:
        """Bytes that this process can use, including what it has already."""
        if self.total is None or self.free is None or self.reserved is None:
            return None
        if self.others is None:
            return min(self.total, self.free + self.reserved)
        return max(0, self.total - self.others)

    def __str__(self) -> str:
        if self.total is None or self.free is None:
            return self.reason or f"{self.device}: memory unknown"
        text = f"{self.device}: {_gib(self.free)} of {_gib(self.total)} GiB free"
        if self.others is None:
            return f"{text}; what other processes use is not known ({self.reason})"
        return f"{text}; {_users(self.processes)} {_gib(self.others)} GiB"


def cap_process(device: torch.device, nbytes: int, *, needed: int | None = None, context_bytes: int = 0) -> int:
    """Limit this process to ``nbytes`` of the GPU: beyond them PyTorch raises its OutOfMemoryError.

    A CPU is not capped: its allocator has no such limit.

    Args:
        nbytes: budget of the whole process, the CUDA context included.
        needed: minimum for the whole process; default: all of ``nbytes``. A plan that needs 20 GiB of a 24 GiB budget
            also runs on a card that shows 23.6.
        context_bytes: of ``nbytes``, what the context and the libraries take in addition to PyTorch's allocator.

    Returns:
        Bytes that the allocator may take from the driver.

    Raises:
        UserError: the card is too small, other processes use too much of it, or ``nbytes`` do not exceed the context.
    """
    if device.type != "cuda":
        return nbytes
    memory = DeviceMemory.of(device)
    total, available = memory.total, memory.available
    assert total is not None
    assert available is not None
    needed = nbytes if needed is None else needed
    if needed > available:
        raise UserError(_refusal(memory, needed, total, available))
    allowed = min(nbytes, available) - context_bytes
    if allowed <= 0:
        raise UserError(
            f"a budget of {_gib(nbytes)} GiB on {device} is not more than the {_gib(context_bytes)} GiB of the CUDA "
            "context itself; give a larger --vram"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
    return allowed


def open_driver() -> Any:
    """NVML, or why it is not available, as a string. The caller calls ``nvmlShutdown``."""
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py is missing"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver: {error}"
    return pynvml


def open_gpu(device: torch.device) -> tuple[Any, Any] | str:
    """NVML and its handle of a CUDA device, or why they are not available. The caller calls ``nvmlShutdown``."""
    pynvml = open_driver()
    if isinstance(pynvml, str):
        return pynvml
    # NVML numbers the devices differently from CUDA; the identifier is common to both.
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("GPU", "MIG"):
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        except pynvml.NVMLError as error:
            reason = f"the driver does not know {device}: {error}"
    pynvml.nvmlShutdown()
    return reason


def _others(nvml: Any, handle: Any, reserved: int) -> tuple[int, int | None]:
    """Bytes and number of the other processes.

    This process's share is the driver's figure; where the process list is closed, or has the numbers of another
    namespace (a container), it is what PyTorch has reserved, and our context counts as others'.
    """
    try:
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    except (AttributeError, nvml.NVMLError):
        # Older drivers add their own share.
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    processes: dict[int, int | None] = {}
    for query in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            # A process that computes and draws is in both lists, with the same figure; None under WDDM.
            processes |= {process.pid: process.usedGpuMemory for process in query(handle)}
        except nvml.NVMLError:
            continue
    own = processes.get(os.getpid())
    if own is None and len(processes) == 1:
        (own,) = processes.values()
    return max(0, used - (reserved if own is None else own)), len(processes) - 1 if processes else None


def _refusal(memory: DeviceMemory, needed: int, total: int, available: int) -> str:
    rest = math.floor(available / GIB * 10) / 10
    smaller = f"give --vram {rest:.1f}G or less" if rest >= 1 else "use another GPU"
    if needed > total:
        return f"{memory.device} has {_gib(total)} GiB and {_gib(needed)} are needed; {smaller}"
    used = f"{_users(memory.processes)} {_gib(total - available)} of its {_gib(total)} GiB"
    return (
        f"{_gib(needed)} GiB of {memory.device} are not available: {used}; stop them (nvidia-smi lists them), "
        f"or {smaller}"
    )


def _users(processes: int | None) -> str:
    if not processes:
        return "other processes use"
    return "1 other process uses" if processes == 1 else f"{processes} other processes use"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
