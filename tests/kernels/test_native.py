from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sqdf_fast.kernels import native

needs_native = pytest.mark.skipif(not native.available(), reason="installed without the native library")


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    """The loader as it is before its first use, here and for the tests that follow."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@needs_native
def test_the_library_declares_the_version_that_the_header_has() -> None:
    header = (Path(native.__file__).parent / "native.h").read_text()
    assert f"#define SQDF_FAST_ABI_VERSION {native.ABI_VERSION}\n" in header
    assert native.library().sqdf_fast_abi_version() == native.ABI_VERSION
    assert native.unavailable_reason() is None


@needs_native
def test_openmp_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    threads = native.library().sqdf_fast_max_threads
    if threads() == 1 and before > 1:
        pytest.skip("built without OpenMP")
    torch.set_num_threads(3)
    found = threads()
    torch.set_num_threads(before)
    assert found == 3


@needs_native
def test_the_instruction_set_fits_the_processor() -> None:
    known = {
        "AVX-512": {"AVX512"},
        "AVX2": {"AVX2", "AVX512"},
        "baseline": {"DEFAULT", "AVX2", "AVX512", "NO AVX"},
    }
    assert torch.backends.cpu.get_cpu_capability() in known[native.instruction_set()]


def _without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", "")
    monkeypatch.setattr("sqdf_fast.kernels.__path__", [str(tmp_path)])
    return "no C\\+\\+ compiler"


def _not_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", str(path))
    return "broken.so does not load"


def _of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if native.find() is None:
        pytest.skip("installed without the native library")
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    return f"ABI {native.ABI_VERSION - 1}, this package needs {native.ABI_VERSION}"


@pytest.mark.usefixtures("fresh_loader")
@pytest.mark.parametrize("break_it", [_without_library, _not_a_library, _of_another_version])
def test_a_missing_library_is_one_line_and_no_crash(
    break_it, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = break_it(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING, logger="sqdf_fast.kernels"):
        assert [native.available() for _ in range(3)] == [False] * 3
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    with pytest.raises(RuntimeError, match=expected):
        native.library()


@needs_native
def test_pointer_refuses_what_c_cannot_walk() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert ctypes.c_float.from_address(native.pointer(tensor) + 4).value == 1.0
    with pytest.raises(ValueError, match="contiguous"):
        native.pointer(tensor.T)
