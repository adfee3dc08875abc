from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch
from support.kernel_targets import OPS

from sqdf_fast.commands import doctor as info
from sqdf_fast.kernels import native


def test_packages_are_the_declared_ones_with_their_versions() -> None:
    found = {package.name: package for package in info.packages()}
    assert found["torch"] == info.Package("torch", importlib.metadata.version("torch"), "")
    assert found["hypothesis"].extra == "test"
    assert "sqdf-fast" not in found


def test_every_op_is_listed_with_the_implementation_it_takes() -> None:
    assert set(info.ops()) >= {"denoise_step", "discounted_loss", "philox", "posterior_mean"}
    choice = info.choose("philox", "cpu")
    assert choice.implementation == ("native" if native.available() else "reference")
    assert "triton" in choice.reasons
    assert choice.implementation not in choice.reasons


def test_the_optimizer_s_op_is_listed_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the engine takes bitsandbytes."""
    card = info.Gpu(0, "Card", (9, 0), 2**30, 2**30, None, None)
    monkeypatch.setattr(info, "_gpus", lambda: ([card], None))
    listed = [(choice.op, choice.device) for choice in info.facts().choices]
    assert listed == [
        *((op, "cpu") for op in sorted(["adamw_8bit", *OPS])),
        *((op, "cuda") for op in sorted(OPS)),
    ]


def test_the_report_says_which_implementation_and_why() -> None:
    found = info.facts()
    text = info.report(found)
    assert f"torch uses {torch.get_num_threads()} threads" in text
    assert (found.native or found.native_reason or "") in text
    for choice in found.choices:
        line = next(x for x in text.splitlines() if x.split()[:2] == [choice.op, choice.device])
        assert choice.implementation in line
        assert all(reason in line for reason in choice.reasons.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_without_cuda_the_report_says_why() -> None:
    found = info.facts()
    assert found.gpus == []
    assert found.gpu_reason
    assert f"GPU: none ({found.gpu_reason})" in info.report(found)


def test_a_gpu_is_described_in_one_line() -> None:
    gpu = info.Gpu(0, "Card", (8, 9), 24 * 2**30, 20 * 2**30, "600.1", 7)
    assert str(gpu) == "GPU 0: Card, sm_89, 20.0 of 24.0 GiB free, driver 600.1, 7 % busy"


class Nvml(types.ModuleType):
    """The part of pynvml that is used; ``busy`` None: the GPU refuses."""

    class NVMLError(Exception):
        pass

    def __init__(self, busy: int | None) -> None:
        super().__init__("pynvml")
        self.busy, self.opened = busy, 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "600.1"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> types.SimpleNamespace:  # noqa: N802
        assert handle == "GPU-1234"
        if self.busy is None:
            raise self.NVMLError("Not Supported")
        return types.SimpleNamespace(gpu=self.busy)


@pytest.mark.parametrize("busy", [7, None])
def test_the_driver_is_asked_about_the_gpu_that_torch_means(monkeypatch: pytest.MonkeyPatch, busy: int | None) -> None:
    nvml = Nvml(busy)
    properties = types.SimpleNamespace(name="Card", major=8, minor=9, total_memory=24 * 2**30, uuid="1234")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 24 * 2**30))
    assert info._gpu(0) == info.Gpu(0, "Card", (8, 9), 24 * 2**30, 20 * 2**30, "600.1", busy)
    assert nvml.opened == 0


def test_without_nvml_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._gpus() == ([], "the package nvidia-ml-py is missing")


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    assert str(info.Package("triton", None, "cuda")) == "not installed (extra: cuda)"
    assert str(info.Package("torch", None, "")) == "MISSING"


@pytest.mark.slow
def test_the_module_prints_the_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sqdf_fast.commands.doctor"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"sqdf-fast {importlib.metadata.version('sqdf-fast')}\n")
    assert "denoise_step" in done.stdout
