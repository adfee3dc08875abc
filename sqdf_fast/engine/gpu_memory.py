"""A run inside its memory budget: what the GPU has, what other processes hold, and the cap.

What the driver knows comes from NVML (package nvidia-ml-py). Without it, or without its permission, a figure is None
and a sentence says why.
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
        total: that CUDA programs may use; free: of it, allocated by nobody.
        reserved: what this process's PyTorch has taken from the driver.
        others: held by other processes; processes: how many they are.
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
        """Ask CUDA and the driver. Creates the CUDA context, as any first use of the GPU does."""
        if device.type != "cuda":
            return DeviceMemory(device, reason=f"{device} is no GPU: its memory is the machine's own")
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        opened = open_gpu(device)
        if isinstance(opened, str):
            return DeviceMemory(device, total, free, reserved, reason=opened)
        nvml, handle = opened
        try:
            others, processes = _held_by_others(nvml, handle, reserved)
        except nvml.NVMLError as error:
            return DeviceMemory(device, total, free, reserved, reason=f"the driver does not tell: {error}")
        finally:
            nvml.nvmlShutdown()
        return DeviceMemory(device, total, free, reserved, others, processes)

    @property
    def available(self) -> int | None:
        """Bytes that this process can hold, what it holds already included."""
        if self.total is None or self.free is None or self.reserved is None:
            return None
        if self.others is None:
            return min(self.total, self.free + self.reserved)
        return max(0, self.total - self.others)

    def __str__(self) -> str:
        if self.total is None or self.free is None:
            return self.reason or f"{self.device}: memory unknown"
        text = f"{self.device}: {self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free"
        if self.others is None:
            return f"{text}; what others hold is not known ({self.reason})"
        return f"{text}; {_who(self.processes)} {self.others / GIB:.1f} GiB"


def cap_process(device: torch.device, nbytes: int, *, needed: int | None = None, context_bytes: int = 0) -> int:
    """Hold this process to ``nbytes`` of the GPU: PyTorch then raises its OutOfMemoryError instead of taking more.

    A CPU is not capped: its allocator has no such limit, and nothing happens.

    Args:
        nbytes: of the whole process, the CUDA context included.
        needed: the least that is enough, of the whole process; default: all of ``nbytes``. A budget of 24 GiB on a card
            that shows 23.6 is met by a plan that needs 20.
        context_bytes: of ``nbytes``, what the context and the libraries take beside PyTorch's allocator.

    Returns:
        Bytes that the allocator may take from the driver.

    Raises:
        UserError: ``needed`` cannot be had: the card is too small, or others hold too much of it; or ``nbytes`` are
            not more than the context.
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
    """NVML, or as a string why there is none. Whoever gets it calls ``nvmlShutdown``."""
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
    """NVML and its handle of a CUDA device, or why there is none. Whoever gets them calls ``nvmlShutdown``."""
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


def _held_by_others(nvml: Any, handle: Any, reserved: int) -> tuple[int, int | None]:
    """Bytes and number of the other processes, this one having a CUDA context.

    What is ours is the driver's figure for this process; where the process list is closed, or shows numbers of another
    namespace (a container), what PyTorch has reserved, and our context then counts as others'.
    """
    used = _used(nvml, handle)
    processes = _processes(nvml, handle)
    own = processes.get(os.getpid())
    if own is None and len(processes) == 1:
        (own,) = processes.values()
    return max(0, used - (reserved if own is None else own)), len(processes) - 1 if processes else None


def _used(nvml: Any, handle: Any) -> int:
    """Bytes that processes hold; older drivers add what they keep for themselves."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    except (AttributeError, nvml.NVMLError):
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """Bytes by process, None where the driver does not tell (WDDM); empty where the list is closed."""
    found: dict[int, int | None] = {}
    for query in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            # A process that computes and draws is in both lists, with the same figure.
            found |= {process.pid: process.usedGpuMemory for process in query(handle)}
        except nvml.NVMLError:
            continue
    return found


def _refusal(memory: DeviceMemory, needed: int, total: int, available: int) -> str:
    rest = math.floor(available / GIB * 10) / 10
    smaller = f"give --vram {rest:.1f}G or less" if rest >= 1 else "take another GPU"
    if needed > total:
        return f"{memory.device} has {_gib(total)} GiB and {_gib(needed)} are needed; {smaller}"
    held = f"{_who(memory.processes)} {_gib(total - available)} of its {_gib(total)} GiB"
    given = f"{_gib(needed)} GiB of {memory.device} cannot be had: {held}"
    return f"{given}; stop them (nvidia-smi lists them), or {smaller}"


def _who(processes: int | None) -> str:
    if not processes:
        return "others hold"
    return "1 other process holds" if processes == 1 else f"{processes} other processes hold"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
