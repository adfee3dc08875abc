"""The compile gate of the Triton kernels passes, and each of its checks can fail."""

# ruff: noqa: N803 (compile-time constants of a kernel are capitals everywhere in this field)
from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_targets import OPS

from sqdf_fast.kernels import native

triton = pytest.importorskip("triton", reason="no Triton wheel for this platform")
tl = triton.language

GATE = Path(__file__).with_name("gate.py")
KERNELS = Path(native.__file__).parent
BLOCK = 1024


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("gate", GATE)
    sys.modules["gate"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gate"]


@pytest.mark.slow
@pytest.mark.parametrize(("architectures", "compiled"), [((75, 120), 60), ((75, 80, 86, 89, 90, 100, 120), 210)])
def test_every_kernel_and_dtype_passes(architectures, compiled):
    """The oldest and the newest generation; all of them in `make test-all`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    jobs = "1" if len(architectures) == 2 else "2"
    command = [sys.executable, GATE, "--quick", "--jobs", jobs, "--architectures", *map(str, architectures)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{compiled} compiled: 30 kernels on {len(architectures)} architectures\n"


def launches_in_source():
    """(op, kernel) of every launch, `kernel[grid](...)`, in the Triton implementations."""
    found = set()
    for op in OPS:
        tree = ast.parse((KERNELS / op / "triton.py").read_text(encoding="utf-8"))
        calls = (node.func.value for node in ast.walk(tree) if isinstance(node, ast.Call) and is_subscript(node.func))
        found |= {(op, kernel.id) for kernel in calls}
    return found


def is_subscript(node):
    return isinstance(node, ast.Subscript)


@pytest.mark.parametrize("quick", [True, False])
def test_the_gate_compiles_every_kernel_that_is_launched(gate, quick, monkeypatch):
    """A kernel that `calls` misses would be compiled by nobody."""
    launched = set()

    def note(kernel, *arguments, grid, warmup, **keywords):
        launched.add((kernel.fn.__module__.split(".")[-2], kernel.fn.__name__))

    monkeypatch.setattr(gate.JITFunction, "run", note)
    for call in gate.calls(quick):
        call()
    assert launched == launches_in_source()
    assert {op for op, _ in launched} == set(OPS)


def copy(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o) * 1.1)


def in_float64(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, (tl.load(x + o).to(tl.float64) * 1.1).to(tl.float32))


def misaligned(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o + 1) * 1.1)


def gathering(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(out + o, tl.load(x + (b_x * 10).to(tl.int32)))


def spilling(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.arange(0, 16 * BLOCK)
    b_x = tl.load(x + o)
    tl.store(out + o, b_x - tl.sum(b_x))


def transposing(x, out, n_elements, BLOCK: tl.constexpr):
    o = tl.arange(0, 256)[:, None] * 256 + tl.arange(0, 256)
    tl.store(out + o, tl.trans(tl.load(x + o)))


@pytest.mark.parametrize(
    ("kernel", "warps", "violation"),
    [
        (copy, 4, None),
        (in_float64, 4, "float64 arithmetic"),
        (misaligned, 4, "2 accesses of 128 bits instead of 4"),
        (gathering, 4, "8 narrow loads and 0 narrow stores"),
        (spilling, 1, "stack of"),
        (transposing, 8, "bytes of shared memory"),
    ],
)
@pytest.mark.parametrize("architecture", [75, pytest.param(90, marks=pytest.mark.slow)])
def test_each_check_can_fail(gate, kernel, warps, violation, architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size = {spilling: 16 * BLOCK, transposing: 256 * 256}.get(kernel, 4 * BLOCK)
    x, out = (torch.empty(size, device="meta") for _ in range(2))
    with gate.compile_only(architecture) as launches:
        programs = size // BLOCK if kernel in (copy, in_float64, misaligned, gathering) else 1
        triton.JITFunction(kernel)[(programs,)](x, out, size, BLOCK, num_warps=warps)
    (row,) = gate.inspect(launches, architecture)
    assert row.registers > 0
    if violation is None:
        assert row.violations == []
    else:
        assert any(violation in found for found in row.violations), row


def test_a_stale_table_is_noticed(gate, monkeypatch, tmp_path):
    row = gate.Row(("op forward", "fp32", ""), 75, registers=30)
    rows = [gate.Row(row.label, architecture, row.registers) for architecture in gate.ARCHITECTURES]
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.md")
    gate.TABLE.write_text(gate.table(gate.cells(rows)))
    assert gate.stale(gate.cells(rows), whole=True) == []
    assert gate.stale(gate.cells(rows[:2]), whole=False) == []
    assert len(gate.stale(gate.cells(rows[:2]), whole=True)) == len(rows) - 2
    rows[3].registers = 31
    assert len(gate.stale(gate.cells(rows), whole=False)) == 1
    assert len(gate.stale(gate.cells(rows), whole=True)) == 2
