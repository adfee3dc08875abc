"""Find the native library, load it once through ctypes, check its version. Importing this module does nothing."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError

ABI_VERSION = 5
"""Must equal SQDF_FAST_ABI_VERSION in native.h."""

_FILE_NAME = {"win32": "sqdf_fast_native.dll", "darwin": "libsqdf_fast_native.dylib"}.get(
    sys.platform, "libsqdf_fast_native.so"
)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # sqdf_fast::Dtype in rows.h
_ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "d": ctypes.c_double}

_INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")  # sqdf_fast::InstructionSet in native.h

_NOT_INSTALLED = (
    f"{_FILE_NAME} is not installed (no C++ compiler when the package was built); "
    "install a compiler and run the installation again"
)

_log = logging.getLogger("sqdf_fast.kernels")


def available() -> bool:
    """Whether the native library can be used. The first call loads it and logs one line when it cannot."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """One line that says why the native library cannot be used and what to do; None when it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: the library is not available; the message is `unavailable_reason()`.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def instruction_set() -> str:
    """Instruction set of the inner loops: "AVX-512", "AVX2" or "baseline"."""
    return _INSTRUCTION_SETS[function("sqdf_fast_instruction_set", "", "i")()]


def limit_instruction_set(limit: str) -> None:
    """Make the inner loops use the best instruction set of this processor up to `limit`; results stay the same."""
    function("sqdf_fast_limit_instruction_set", "i")(_INSTRUCTION_SETS.index(limit))


def limit_cached_traffic(traffic: int | None) -> None:
    """Make calls that move more bytes than `traffic` write past the cache; None: the default of this processor.

    Results stay the same.
    """
    function("sqdf_fast_limit_cached_traffic", "l")(-1 if traffic is None else traffic)


@functools.cache
def function(name: str, arguments: str, result: str = "") -> Callable[..., Any]:
    """An exported function. One letter per argument: p(ointer), i(nt32), l (int64), d(ouble); result "" is void."""
    found = getattr(library(), name)
    found.argtypes = [_ARGUMENTS[letter] for letter in arguments]
    found.restype = _ARGUMENTS[result] if result else None
    return found


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a native op cannot run on `device` with arithmetic in `dtype`, or None."""
    if device.type != "cpu":
        return "runs on the CPU only"
    if dtype == torch.float64:
        return "float64 runs in the reference only"
    return unavailable_reason()


def address(tensor: Tensor | None) -> int | None:
    """Address of the values; null for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def typed(tensor: Tensor | None) -> tuple[int | None, int]:
    """Address and dtype number of a tensor; null and 0 for no tensor.

    Raises:
        UserError: a dtype that native ops neither read nor write.
    """
    if tensor is None:
        return None, 0
    number = _DTYPES.get(tensor.dtype)
    if number is None:
        raise UserError(
            f"native ops take float32, float16 and bfloat16, not {tensor.dtype}; convert it or use impl='reference'"
        )
    return tensor.data_ptr(), number


def run_rows(
    name: str,
    letters: str,
    inputs: tuple[Any, ...],
    table: Tensor,
    index: Tensor,
    scales: tuple[float, ...],
    x: Tensor,
    outputs: tuple[Any, ...],
) -> None:
    """Call an exported function that computes every sample of x [B, ...] from its row of a coefficient table.

    Its arguments are inputs, table, steps, index, scales, B, elements of a sample, outputs, threads.

    Raises:
        IndexError: an index outside the table, as PyTorch's indexing raises it.
    """
    table = (table if table.dtype == torch.float32 else table.float()).contiguous()
    index, steps, batch = index.contiguous(), table.shape[0], x.shape[0]
    rows, sizes = (table.data_ptr(), steps, index.data_ptr()), (batch, x.numel() // batch)
    if function(name, letters, "i")(*inputs, *rows, *scales, *sizes, *outputs, threads()):
        raise IndexError(f"index holds a position outside a schedule of {steps} steps")


def threads() -> int:
    """The `threads` argument of every native op: the number that PyTorch uses for its own operators."""
    return torch.get_num_threads()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = find()
    loaded, reason = (None, _NOT_INSTALLED) if path is None else _open(path)
    if reason is not None:
        _log.warning("native kernels are off: %s", reason)
    return loaded, reason


def find() -> Path | None:
    """The library file, or None. A wheel and an editable installation keep it in different folders.

    The environment variable SQDF_FAST_NATIVE_LIBRARY names another build, such as one with sanitizers.
    """
    import sqdf_fast.kernels

    if chosen := os.environ.get("SQDF_FAST_NATIVE_LIBRARY"):
        return Path(chosen)
    candidates = (Path(folder) / _FILE_NAME for folder in sqdf_fast.kernels.__path__)
    return next((path for path in candidates if path.is_file()), None)


def _open(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    # PyTorch is imported first (above), so that both share one OpenMP runtime and its threads.
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.sqdf_fast_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load ({error}); run the installation again"
    if version != ABI_VERSION:
        reason = f"{path.name} has ABI {version}, this package needs {ABI_VERSION}; run the installation again"
        return None, reason
    return loaded, None
