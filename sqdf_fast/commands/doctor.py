"""What this environment has: versions, devices, the native library; which implementation an op takes and why.

`python -m sqdf_fast.commands.doctor` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from sqdf_fast import __version__
from sqdf_fast.display import text_table

CPU_OPS = ("adamw_8bit",)
"""Ops that nothing takes on a GPU: there the 8-bit optimizer is bitsandbytes'."""


@dataclass(frozen=True)
class Package:
    """A dependency: the installed version or None, and the extra that brings it ("" for a required one)."""

    name: str
    version: str | None
    extra: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as PyTorch numbers it. Memory in bytes; the driver's view needs NVML, None without it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    memory_free: int
    driver: str | None
    utilisation: int | None  # percent of the last sample period in which a kernel ran


@dataclass(frozen=True)
class Choice:
    """What impl="auto" takes for one op on one device, and why the ones before it were passed over."""

    op: str
    device: str
    implementation: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """Everything `report` shows. `native` is None when the library is missing; `native_reason` says why."""

    python: str
    system: str
    cpu: str
    cores: int
    torch_threads: int
    cuda: str | None
    packages: list[Package]
    gpus: list[Gpu]
    gpu_reason: str | None
    native: str | None
    native_reason: str | None
    choices: list[Choice]


def facts() -> Facts:
    """Look around: imports torch, loads the native library, queries the driver; changes nothing."""
    import torch

    from sqdf_fast.kernels import native

    gpus, gpu_reason = _gpus()
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_processor(),
        cores=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        cuda=torch.version.cuda,
        packages=packages(),
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
            found.setdefault(name, Package(name, _version(name), extra.group(1) if extra else ""))
    return sorted(found.values(), key=lambda package: (package.extra, package.name.lower()))


def ops() -> list[str]:
    """Names of the ops."""
    from sqdf_fast.kernels.registry import OPS

    return sorted(OPS)


def choose(op: str, device: str) -> Choice:
    """What impl="auto" takes for `op` in float32 on "cpu" or "cuda"."""
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
    """`facts()` as text for a person."""
    found = facts() if found is None else found
    lines = [
        f"sqdf-fast {__version__}",
        f"python {found.python}, {found.system}",
        f"CPU: {found.cpu}, {found.cores} cores, torch uses {found.torch_threads} threads",
        *(_gpu_line(gpu) for gpu in found.gpus),
    ]
    if found.gpu_reason:
        lines.append(f"GPU: none ({found.gpu_reason})")
    lines.append(f"native library: {found.native or found.native_reason}")
    choices = [[choice.op, choice.device, choice.implementation, _passed_over(choice)] for choice in found.choices]
    lines += [
        "",
        "implementation that impl='auto' selects, in float32:",
        text_table(("op", "device", "selected", "why not another"), choices, left=range(4)),
    ]
    packages = [[package.name, _package_state(package)] for package in found.packages]
    lines += ["", text_table(("package", "version"), packages, left=range(2))]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.processor() or "unknown"


def _gpus() -> tuple[list[Gpu], str | None]:
    import torch

    if torch.version.cuda is None:
        return [], "this build of torch has no CUDA support"
    if not torch.cuda.is_available():
        return [], _without_driver() or "the driver works, but torch cannot use it: its CUDA version may be too new"
    return [_gpu(index) for index in range(torch.cuda.device_count())], None


def _without_driver() -> str | None:
    """Why the NVIDIA driver cannot be asked, or None."""
    from sqdf_fast.engine.gpu_memory import open_driver

    nvml = open_driver()
    if isinstance(nvml, str):
        return nvml
    nvml.nvmlShutdown()
    return None


def _gpu(index: int) -> Gpu:
    import torch

    from sqdf_fast.engine.gpu_memory import open_gpu

    properties = torch.cuda.get_device_properties(index)
    driver = utilisation = None
    free = torch.cuda.mem_get_info(index)[0]
    opened = open_gpu(torch.device("cuda", index))
    if not isinstance(opened, str):
        nvml, handle = opened
        try:
            driver = nvml.nvmlSystemGetDriverVersion()
            utilisation = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        except nvml.NVMLError:
            pass  # a partition of a GPU or a container may refuse a query
        finally:
            nvml.nvmlShutdown()
    capability = (properties.major, properties.minor)
    return Gpu(index, properties.name, capability, properties.total_memory, free, driver, utilisation)


def _gpu_line(gpu: Gpu) -> str:
    gib = 2**30
    state = f"GPU {gpu.index}: {gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, "
    state += f"{gpu.memory_free / gib:.1f} of {gpu.memory / gib:.1f} GiB free"
    if gpu.driver is not None:
        state += f", driver {gpu.driver}"
    if gpu.utilisation is not None:
        state += f", {gpu.utilisation} % busy"
    return state


def _passed_over(choice: Choice) -> str:
    return "; ".join(f"not {name}: {reason}" for name, reason in choice.reasons.items())


def _package_state(package: Package) -> str:
    if package.version is not None:
        return package.version
    return f"not installed (extra: {package.extra})" if package.extra else "MISSING"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
