"""Compile every Triton kernel for every GPU generation, without a GPU, and check the machine code.

The launchers run on tensors without memory under a stand-in driver: what is compiled is what they launch, with the same
specialization. Usage:

    python tests/kernels/gate.py            all kernels, dtypes, flags and architectures; exit status 1 on a violation
    python tests/kernels/gate.py --quick    a subset of the flags
    python tests/kernels/gate.py --write    also write bench/results/kernel_registers.md
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sqdf_fast.kernels import registry
from sqdf_fast.kernels.spec import SINGLE

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SCALAR_LOADS = 6  # index, seed or grad_kl, three coefficients, and one to spare
SCALAR_STORES = 1  # the KL's partial sum
TABLE = Path(__file__).parents[2] / "bench" / "results" / "kernel_registers.md"
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "int32"}


Cell = tuple[str, str, str, int]
"""Kernel, dtypes, flags and architecture."""


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher started it."""

    op: str
    name: str
    arguments: dict[str, Any]
    programs: int
    compiled: Any

    @property
    def threads(self) -> int:
        return self.programs * 32 * int(self.compiled.metadata.num_warps)

    @property
    def streamed(self) -> dict[str, torch.Tensor]:
        """The tensors with whole samples in them."""
        elements = self.arguments.get("n_elements", 0)
        tensors = {name: a for name, a in self.arguments.items() if isinstance(a, torch.Tensor)}
        return {name: t for name, t in tensors.items() if elements and t.shape[-1] == elements}

    @property
    def ragged(self) -> bool:
        return self.arguments.get("n_elements", 0) % 16 != 0

    @property
    def accesses(self) -> int:
        """128-bit loads and stores by which a thread moves its part of the streamed tensors."""
        return sum(t.numel() * t.element_size() // (16 * self.threads) for t in self.streamed.values())

    def label(self) -> tuple[str, str, str]:
        """Kernel, dtypes, flags."""
        names: dict[str, list[str]] = {}
        for name, tensor in (self.streamed or self.arguments).items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype in SHORT:
                names.setdefault(SHORT[tensor.dtype], []).append(name)
        only = len(names) == 1
        dtypes = ", ".join(short if only else f"{' '.join(tensors)} {short}" for short, tensors in names.items())
        flags = [name.lower() for name, value in self.arguments.items() if value is True]
        flags += [f"no {name}" for name, value in self.arguments.items() if value is None]
        elements = self.arguments.get("n_elements", 0)
        flags += ["one element"] if elements == SINGLE else ["ragged"] if self.ragged else []
        flags += ["64-bit length"] if elements >= 2**31 else []
        return f"{self.op} {self.name.removesuffix('_kernel')}", dtypes, ", ".join(flags)


@dataclass
class Row:
    """What one kernel became on one architecture."""

    label: tuple[str, str, str]
    architecture: int
    registers: int = 0
    shared: int = 0
    violations: list[str] = field(default_factory=list)


class StandIn:
    """A driver for a GPU that is not there. The device's number is its architecture: each has its own kernels."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compile_only(architecture: int) -> Iterator[list[Launch]]:
    """Kernels are compiled for `architecture`, not run; the list fills with them."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False))
        launches.append(Launch(self.fn.__module__.split(".")[-2], self.fn.__name__, arguments, grid[0], compiled))
        return compiled

    JITFunction.run = compile_kernel
    triton.runtime.driver.set_active(StandIn(architecture))
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = None


def calls(quick: bool) -> Iterator[Callable[[], object]]:
    """Every call of a launcher that the ops declare."""
    for op in registry.OPS:
        if launches := registry.spec(op).launches:
            yield from launches(quick)


def rows(architecture: int, quick: bool) -> list[Row]:
    """Every kernel on one architecture."""
    with compile_only(architecture) as launches:
        for call in calls(quick):
            call()
    distinct = {launch.label(): launch for launch in launches}
    return inspect(list(distinct.values()), architecture)


def inspect(launches: list[Launch], architecture: int) -> list[Row]:
    """The resources of compiled kernels, and what is wrong with them."""
    programs = [machine_code(launch.compiled.asm["cubin"]) for launch in launches]
    found = []
    for launch, instructions in zip(launches, disassemble(programs, launches[0].compiled.metadata), strict=True):
        usage = resource_usage(launch.compiled.asm["cubin"])
        shared = launch.compiled.metadata.shared
        row = Row(launch.label(), architecture, usage["REG"], shared)
        if usage["STACK"] or usage["LOCAL"]:
            row.violations.append(f"stack of {usage['STACK']} bytes, {usage['LOCAL']} bytes of local memory")
        if shared > (65536 if architecture == 75 else 101376):
            row.violations.append(f"{shared} bytes of shared memory")
        if ".f64" in launch.compiled.asm["ptx"]:
            row.violations.append("float64 arithmetic")
        if launch.streamed and not launch.ragged:
            row.violations += access_violations(instructions, launch.accesses)
        found.append(row)
    return found


def access_violations(instructions: str, expected: int) -> list[str]:
    """What is wrong with the accesses to global memory of a kernel that streams tensors."""
    loads, stores = (re.findall(rf"\b{opcode}\.[\w.]*", instructions) for opcode in ("LDG", "STG"))
    wide = sum(".128" in access for access in loads + stores)
    narrow_loads, narrow_stores = (sum(".128" not in access for access in some) for some in (loads, stores))
    violations = []
    if wide != expected:
        violations.append(f"{wide} accesses of 128 bits instead of {expected}")
    if narrow_loads > SCALAR_LOADS or narrow_stores > SCALAR_STORES:
        violations.append(f"{narrow_loads} narrow loads and {narrow_stores} narrow stores")
    return violations


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the only kernel of a cubin: REG, STACK, LOCAL and more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = tool("cuobjdump", "--dump-resource-usage", file.name)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the only kernel of a cubin: the section .text.NAME of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    offset = sections[names][4]
    (code,) = (s for s in sections if cubin.startswith(b".text.", offset + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def disassemble(programs: list[bytes], metadata: Any) -> list[str]:
    """The instructions of each program. One call for all: nvdisasm spends its time on starting."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(programs))
        file.flush()
        text = tool("nvdisasm", "--binary", f"SM{metadata.target.arch}", "--no-dataflow", file.name)
    lines = {int(line[1], 16): line[2] for line in re.finditer(r"/\*([0-9a-f]{4,})\*/(.*)", text)}
    ends = list(itertools.accumulate(map(len, programs)))
    return [
        "\n".join(lines.get(address, "") for address in range(end - len(program), end, 16))
        for program, end in zip(programs, ends, strict=True)
    ]


def tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that the Triton wheel brings along."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def cells(found: list[Row]) -> dict[Cell, str]:
    """Registers and shared memory of every kernel on every architecture."""
    return {(*row.label, row.architecture): f"{row.registers} / {row.shared}" for row in found}


def table(fresh: dict[Cell, str]) -> str:
    """The file of `TABLE`."""
    lines = [
        "# Registers and shared memory of the Triton kernels",
        "",
        "Written by `make gate ARGS=--write`; no GPU is needed.",
        f"Compiled by Triton {triton.__version__}.",
        "",
        "A cell holds the registers of a thread and the bytes of shared memory of a program. No kernel has a stack",
        "frame or spills, none computes in float64, and where the elements of a sample are a multiple of 16 each",
        "access to a tensor of samples is 128 bits wide.",
        "",
        "Flags: `ragged` is a sample whose elements are not a multiple of 16, `64-bit length` one of more than 2^31;",
        "`no NAME` is a tensor that is not given or not wanted (`no noise`: drawn in the kernel).",
    ]
    for kernel, labels in itertools.groupby(sorted({key[:3] for key in fresh}), key=lambda label: label[0]):
        lines += ["", f"## {kernel}", "", "| dtypes | flags | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |"]
        lines += ["| --- " * (2 + len(ARCHITECTURES)) + "|"]
        lines += [f"| {' | '.join([*label[1:], *(fresh[(*label, a)] for a in ARCHITECTURES)])} |" for label in labels]
    return "\n".join(lines) + "\n"


def recorded() -> dict[Cell, str] | None:
    """The cells of the committed table; None if another Triton wrote it, which is not compared."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    if lines and f"Compiled by Triton {triton.__version__}." not in lines:
        return None
    kernel, found = "", {}
    for line in lines:
        if line.startswith("## "):
            kernel = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| dtypes", "| ---")):
            dtypes, flags, *values = (cell.strip() for cell in line[1:-1].split("|"))
            found |= {(kernel, dtypes, flags, a): value for a, value in zip(ARCHITECTURES, values, strict=True)}
    return found


def stale(fresh: dict[Cell, str], whole: bool) -> list[str]:
    """Cells that the committed table lacks or, if everything was compiled, has too many."""
    committed = recorded()
    if committed is None:
        return []
    apart = list(fresh.items() - committed.items()) + (list(committed.items() - fresh.items()) if whole else [])
    return [f"{' | '.join(label)} | sm_{architecture}: {text}" for (*label, architecture), text in sorted(apart)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one set of flags for each kernel and dtype")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="(default: all)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # for the processes that this one spawns
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ.pop("TRITON_INTERPRET", None)
        slowest_first, quick = sorted(options.architectures, reverse=True), itertools.repeat(options.quick)
        if options.jobs == 1:
            found = list(itertools.chain(*map(rows, slowest_first, quick)))
        else:
            with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
                found = list(itertools.chain(*pool.map(rows, slowest_first, quick)))
    report = [f"sm_{row.architecture} {' | '.join(row.label)}: {v}" for row in found for v in row.violations]
    whole = not options.quick and set(options.architectures) == set(ARCHITECTURES)
    if options.write and whole:
        TABLE.write_text(table(cells(found)))
    report += [f"{TABLE.name} differs, run with --write: {line}" for line in stale(cells(found), whole)]
    kernels = {row.label for row in found}
    report.append(f"{len(found)} compiled: {len(kernels)} kernels on {len(options.architectures)} architectures")
    sys.stdout.write("\n".join(report) + "\n")
    return 0 if len(report) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
