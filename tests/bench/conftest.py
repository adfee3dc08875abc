"""Recorded rows with figures chosen by hand, in the form that a benchmark run gives them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

_MACHINE = {
    "system": "Linux x86_64",
    "cpu": "Some CPU (R) 9",
    "cores": 2,
    "caches": {"L3 Unified": "32768K"},
    "torch_threads": 2,
    "native": "AVX2, ABI 2",
    "gpu": "Some GPU 80GB",
    "gpu_memory_gib": 79.2,
    "compute_capability": "9.0",
    "driver": "1.2.3",
    "cuda": "13.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "pytest-benchmark": "5.3.1",
    "sqdf-fast": "0.1.0",
}

_SECONDS = {"eager": 8e-3, "compile": 3e-3, "native": 2e-3, "triton": 2e-3}
_MEGABYTES = {"sd15": 7, "sdxl": 14, "video": 58, "beyond-cache": 175}


def _row(
    op: str, noise: str, device: str, size: str, dtype: str, direction: str, implementation: str
) -> dict[str, Any]:
    seconds = _SECONDS[implementation]
    moved = _MEGABYTES[size] * 1_000_000
    return {
        "op": op,
        "implementation": implementation,
        "direction": direction,
        "device": device,
        "size": size,
        "shape": [8, 4, 64, 64],
        "dtype": dtype,
        "noise": noise,
        "toy": False,
        "median_seconds": seconds,
        "spread": 0.05,
        "bytes_moved": moved,
        "bytes_formula": "13 N e",
        "gb_per_second": moved / seconds / 1e9,
        "copy_gb_per_second": 100.0,
        "copy_fraction": moved / seconds / 1e11,
        "times_eager": _SECONDS["eager"] / seconds,
        "times_compile": _SECONDS["compile"] / seconds,
        "peak_bytes": 3 * 2**20,
    }


@pytest.fixture
def command():
    """`python bench ...`, in this process: (arguments) -> exit status."""
    main = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "__main__.py"))["main"]
    return lambda *arguments: main(arguments)


@pytest.fixture
def recorded() -> dict[str, Any]:
    """What --benchmark-json holds after a run on a machine with a GPU: ours 4 x eager, 1.5 x torch.compile."""
    rows = [
        _row(op, noise, device, size, dtype, direction, implementation)
        for device, dtypes, ours in (("cpu", ["float32"], "native"), ("cuda", ["float32", "bfloat16"], "triton"))
        for op, noise in (("denoise_step", "given"), ("denoise_step", "drawn"), ("posterior_mean", ""))
        for size in _MEGABYTES
        for dtype in dtypes
        for direction in ("forward", "backward", "both")
        for implementation in ("eager", "compile", ours)
    ]
    return {
        "machine_info": _MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [{"extra_info": row} for row in rows],
    }
