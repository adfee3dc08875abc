"""A GPU of 24 GiB that is not here: the driver's and torch.cuda's answers as numbers that a test sets."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from sqdf_fast.engine.gpu_memory import GIB

CUDA = torch.device("cuda:0")
UUID = "1234-5678"


class NVMLError(Exception):
    pass


class Nvml:
    """The part of pynvml that is used. A query whose name is in ``closed`` raises NVMLError."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 33554472  # noqa: N815 (pynvml's own name)

    def __init__(self) -> None:
        self.closed: set[str] = set()
        self.opened = 0
        self.kind = "GPU"
        self.used, self.driver = 0, 0
        self.computing: list[tuple[int, int | None]] = []
        self.drawing: list[tuple[int, int | None]] = []
        self.millijoules, self.milliwatts = 5_000, 100_000

    def _ask(self, query: str, handle: str) -> None:
        assert handle == f"handle of {self.kind}-{UUID}"
        assert self.opened > 0
        if query in self.closed:
            raise NVMLError(f"{query} not permitted")

    def nvmlInit(self) -> None:  # noqa: N802
        if "init" in self.closed:
            raise NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != f"{self.kind}-{UUID}":
            raise NVMLError("Not Found")
        return f"handle of {uuid}"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None):  # noqa: N802
        self._ask("memory v1" if version is None else "memory v2", handle)
        return SimpleNamespace(used=self.used + (self.driver if version is None else 0))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str):  # noqa: N802
        self._ask("processes", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.computing]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str):  # noqa: N802
        self._ask("processes", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.drawing]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self._ask("energy", handle)
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        self._ask("power", handle)
        return self.milliwatts


class Cuda:
    """torch.cuda's allocator and stream, as numbers; elapsed time is the GPU's own."""

    def __init__(self) -> None:
        self.total, self.free, self.reserved = 24 * GIB, 10 * GIB, 2 * GIB
        self.fractions: list[float] = []
        self.allocated = self.peak = 0
        self.milliseconds = 0.0
        self.waits = 0

    def allocate(self, nbytes: int) -> None:
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def reset(self, device: torch.device) -> None:
        assert device == CUDA
        self.peak = self.allocated

    def event(self, enable_timing: bool):
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record(stream: str) -> None:
            assert stream == "stream of cuda:0"
            event.at = self.milliseconds

        def synchronize() -> None:
            self.waits += 1

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda end: end.at - event.at
        return event


def fake_nvml(monkeypatch) -> Nvml:
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def fake_cuda(monkeypatch) -> Cuda:
    fake = Cuda()
    properties = SimpleNamespace(uuid=UUID, total_memory=fake.total, name="NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (fake.free, fake.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: fake.reserved)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fake.fractions.append(fraction)
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: fake.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fake.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fake.reset)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    return fake
