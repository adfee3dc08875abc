"""What this environment has: versions, devices, the native library, and the implementation of each op.

`python -m sqdf_fast.commands.doctor` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

from sqdf_fast import __version__
from sqdf_fast.display import text_table

CPU_OPS = ("adamw_8bit",)
"""Ops that a GPU does not use: its 8-bit optimizer is bitsandbytes'."""


class Package(NamedTuple):
    """A dependency: the installed version or None, and the extra that brings it ("" for a required one)."""

    name: str
    version: str | None
    extra: str

    def __str__(self) -> str:
        return self.version or (f"not installed (extra: {self.extra})" if self.extra else "MISSING")


class Gpu(NamedTuple):
    """A CUDA device as PyTorch numbers it. Memory in bytes; driver and utilization (percent) are None without NVML."""

    number: int
    name: str
    capability: tuple[int, int]
    memory: int
    memory_free: int
    driver: str | None
    utilization: int | None

    def __str__(self) -> str:
        memory = f"{self.memory_free / 2**30:.1f} of {self.memory / 2**30:.1f} GiB free"
        text = f"GPU {self.number}: {self.name}, sm_{self.capability[0]}{self.capability[1]}, {memory}"
        text += "" if self.driver is None else f", driver {self.driver}"
        return text if self.utilization is None else f"{text}, {self.utilization} % busy"


class Choice(NamedTuple):
    """What impl="auto" selects for one op on one device, and why not the implementations before it."""

    op: str
    device: str
    implementation: str
    reasons: dict[str, str]


class Facts(NamedTuple):
    """The machine: `native` is None when the library is missing; `native_reason` says why, `gpu_reason` likewise."""

    cpu: str
    cores: int
    torch_threads: int
    cuda: str | None
    gpus: list[Gpu]
    gpu_reason: str | None
    native: str | None
    native_reason: str | None
    choices: list[Choice]


def facts() -> Facts:
    """Imports torch, loads the native library, queries the driver; changes nothing."""
    import torch

    from sqdf_fast.kernels import native

    gpus, gpu_reason = _gpus()
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return Facts(
        cpu=_processor(),
        cores=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        cuda=torch.version.cuda,
        gpus=gpus,
        gpu_reason=gpu_reason,
        native=f"{native.instruction_set()}, ABI {native.ABI_VERSION}" if native.available() else None,
        native_reason=native.unavailable_reason(),
        choices=[choose(op, device) for device in devices for op in ops() if device == "cpu" or op not in CPU_OPS],
    )


def packages() -> list[Package]:
    """The dependencies that the installed package declares, those of its extras included."""
    found: dict[str, Package] = {}
    for requirement in importlib.metadata.requires("sqdf-fast") or []:
        declared = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        name = declared.group() if declared else requirement
        if name != "sqdf-fast":
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            found.setdefault(name, Package(name, version, extra.group(1) if extra else ""))
    return sorted(found.values(), key=lambda package: (package.extra, package.name.lower()))


def ops() -> list[str]:
    """Names of the ops."""
    from sqdf_fast.kernels.registry import OPS

    return sorted(OPS)


def choose(op: str, device: str) -> Choice:
    """What impl="auto" selects for `op` in float32 on "cpu" or "cuda"."""
    import torch

    from sqdf_fast.kernels.dispatch import IMPLEMENTATIONS, reason_against

    reasons: dict[str, str] = {}
    for name in IMPLEMENTATIONS:
        reason = reason_against(op, name, torch.device(device), torch.float32)
        if reason is None:
            break
        reasons[name] = reason
    # The reference comes last and runs everywhere.
    return Choice(op, device, name, reasons)


def report(found: Facts | None = None) -> str:
    """The environment as text."""
    found = facts() if found is None else found
    choices = [
        [op, device, name, "; ".join(f"not {other}: {reason}" for other, reason in reasons.items())]
        for op, device, name, reasons in found.choices
    ]
    return "\n".join(
        (
            f"sqdf-fast {__version__}",
            f"python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}",
            f"CPU: {found.cpu}, {found.cores} cores, torch uses {found.torch_threads} threads",
            *(map(str, found.gpus) if found.gpus else [f"GPU: none ({found.gpu_reason})"]),
            f"native library: {found.native or found.native_reason}",
            "",
            "implementation that impl='auto' selects, in float32:",
            text_table(("op", "device", "selected", "why not another"), choices, left=range(4)),
            "",
            text_table(("package", "version"), [[package.name, str(package)] for package in packages()], left=range(2)),
        )
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.processor() or "unknown"


def _gpus() -> tuple[list[Gpu], str | None]:
    import torch

    from sqdf_fast.engine.gpu_memory import open_driver

    if torch.version.cuda is None:
        return [], "this build of torch has no CUDA support"
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())], None
    nvml = open_driver()
    if isinstance(nvml, str):
        return [], nvml
    nvml.nvmlShutdown()
    return [], "the driver works, but torch cannot use it: its CUDA version may be too new"


def _gpu(index: int) -> Gpu:
    import torch

    from sqdf_fast.engine.gpu_memory import open_gpu

    properties = torch.cuda.get_device_properties(index)
    driver = utilization = None
    free = torch.cuda.mem_get_info(index)[0]
    opened = open_gpu(torch.device("cuda", index))
    if not isinstance(opened, str):
        nvml, handle = opened
        try:
            driver = nvml.nvmlSystemGetDriverVersion()
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        except nvml.NVMLError:
            pass  # a partition of a GPU or a container may refuse a query
        finally:
            nvml.nvmlShutdown()
    capability = (properties.major, properties.minor)
    return Gpu(index, properties.name, capability, properties.total_memory, free, driver, utilization)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
