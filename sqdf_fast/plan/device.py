"""Known GPUs, the share of them that a training step gets, and how memory sizes are written.

The numbers are the vendors' public specifications: memory as sold, dense bfloat16 tensor throughput with float32
accumulation (float16 on Turing, which has no bfloat16), memory bandwidth, and one direction of the PCIe link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqdf_fast.errors import UserError
from sqdf_fast.plan.memory import StageCount

GIB = 2**30
UTILISATION = 0.45
"""Share of the specified throughput that the matrix products of a diffusion network reach in eager PyTorch.

A round number between the 30 % of small consumer cards at one row and the 60 % of large batches; predicted times scale
with it, comparisons between plans hardly do.
"""
BANDWIDTH_SHARE = 0.8
PCIE_SHARE = 0.8
SECONDS_AN_OPERATOR = 4e-6
"""Fixed cost of a kernel: launch, ramp-up and drain. It makes larger chunks faster."""

CONTEXT_BYTES = 614 * 2**20
"""0.6 GiB outside the allocator: the CUDA context, loaded kernels, cuBLAS and cuDNN."""
FRAGMENTATION = 0.05
"""Share of the budget kept free for fragmentation of the caching allocator."""


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        memory: bytes; flops: dense bf16 tensor FLOP/s; bandwidth, pcie: bytes per second.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    pcie: float

    def seconds(self, stage: StageCount) -> float:
        """Modelled, not measured, time of a stage's work.

        Matrix products run at the slower of arithmetic and memory, the other operators at memory's speed, and every
        operator costs a fixed time on top.
        """
        bandwidth = self.bandwidth * BANDWIDTH_SHARE
        matrix = max(stage.flops / (self.flops * UTILISATION), stage.matrix_bytes / bandwidth)
        return matrix + stage.other_bytes / bandwidth + stage.operators * SECONDS_AN_OPERATOR

    def upload_seconds(self, nbytes: int) -> float:
        """Time to copy ``nbytes`` from pinned host memory."""
        return nbytes / (self.pcie * PCIE_SHARE)


def _device(name: str, gib: int, tflops: float, gigabytes_a_second: float, pcie: float) -> Device:
    return Device(name, gib * GIB, tflops * 1e12, gigabytes_a_second * 1e9, pcie * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _device("RTX 2060", 6, 25.8, 336, 15.75),
        _device("RTX 2080 Ti", 11, 53.8, 616, 15.75),
        _device("T4", 16, 65.0, 320, 15.75),
        _device("RTX 3060", 12, 25.5, 360, 31.5),
        _device("RTX 3070", 8, 40.6, 448, 31.5),
        _device("RTX 3080", 10, 59.5, 760, 31.5),
        _device("RTX 3090", 24, 71.0, 936, 31.5),
        _device("RTX 4060", 8, 30.2, 272, 15.75),
        _device("RTX 4060 Ti", 16, 44.1, 288, 15.75),
        _device("RTX 4070", 12, 58.3, 504, 31.5),
        _device("RTX 4080", 16, 97.5, 717, 31.5),
        _device("RTX 4090", 24, 165.2, 1008, 31.5),
        _device("RTX 5070 Ti", 16, 87.9, 896, 63.0),
        _device("RTX 5080", 16, 112.6, 960, 63.0),
        _device("RTX 5090", 32, 209.5, 1792, 63.0),
        _device("L4", 24, 121.0, 300, 31.5),
        _device("A10", 24, 125.0, 600, 31.5),
        _device("L40S", 48, 362.0, 864, 31.5),
        _device("RTX A6000", 48, 154.8, 768, 31.5),
        _device("A100 40GB", 40, 312.0, 1555, 31.5),
        _device("A100 80GB", 80, 312.0, 2039, 31.5),
        _device("H100", 80, 989.0, 3350, 63.0),
        _device("H200", 141, 989.0, 4800, 63.0),
    )
}
"""By name. Consumer cards halve the rate of float16 with float32 accumulation; the numbers are the halved ones."""

CPU = Device("CPU", 0, 2e11, 2e10, 1e10)
"""Stands for a few CPU cores, to compare plans without a GPU; a budget then covers the tensors alone."""

_TYPICAL = ("RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090", "RTX 5090", "RTX A6000", "A100 80GB", "H200")


def find_device(name: str | None, memory: int) -> Device:
    """The named GPU, or for None a common one of about that much memory.

    Args:
        name: as in DEVICES, "CPU", or as CUDA reports it ("NVIDIA GeForce RTX 4090"); one that is not in the table
            counts as None.
        memory: bytes of the card, or of the budget where no card is known.
    """
    if name == CPU.name:
        return CPU
    if name is not None:
        known = [key for key in DEVICES if _words(key) <= _words(name)]
        if known:
            return DEVICES[max(known, key=lambda key: len(_words(key)))]
    for key in _TYPICAL:
        if DEVICES[key].memory >= 0.95 * memory:
            return DEVICES[key]
    return DEVICES[_TYPICAL[-1]]


def parse_memory(text: str, total: int | None = None) -> int:
    """Bytes of "24G", "24GiB", "8GB", "24000M", "80%" or a plain number of bytes; G and M are binary (2**30, 2**20).

    Args:
        total: bytes of the card, for a percentage.

    Raises:
        UserError: not a size, not above 0, a share without a card or above 100 %.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"invalid --vram {text!r}: expected a size such as 24G, 8GiB or 80%")
    number = float(match[1])
    if match[2] == "%":
        if not 0 < number <= 100:
            raise UserError(f"invalid --vram {text!r}: expected more than 0% and at most 100%")
        if total is None:
            raise UserError(f"invalid --vram {text!r}: no GPU to take a share of; give a size such as 24G")
        return int(total * number / 100)
    size = int(number * _UNITS[match[2]])
    if size <= 0:
        raise UserError(f"invalid --vram {text!r}: expected more than nothing, such as 24G")
    return size


def reserve_bytes(vram: int, device: Device | None = None) -> int:
    """Bytes of ``vram`` that a plan leaves free for the context and fragmentation; 0 on a CPU."""
    return 0 if device is CPU else CONTEXT_BYTES + int(FRAGMENTATION * vram)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower())) - {"nvidia", "geforce", "tesla", "rtx"}


_UNITS = {
    "": 1,
    "b": 1,
    "%": 1,
    "m": 2**20,
    "mb": 2**20,
    "mib": 2**20,
    "g": 2**30,
    "gb": 2**30,
    "gib": 2**30,
    "t": 2**40,
    "tb": 2**40,
    "tib": 2**40,
}
