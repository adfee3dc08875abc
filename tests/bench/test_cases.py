from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import registry
import torch
from cases import ops
from cases.ops import bytes_moved, problems
from cases.parity import make
from harness import machine
from harness.benchmark import Choice
from support.kernel_targets import OPS

from sqdf_fast.errors import UserError

CPU, TOY = Choice("cpu", False), Choice("cpu", True)


def test_every_fused_op_is_measured_reported_and_filed():
    measured = [benchmark.name for benchmark in registry.BENCHMARKS]
    assert sorted(measured) == sorted([*OPS, "adamw_8bit", "sampling", "training_step"])
    for op in OPS:
        problem = next(problems(op, "cpu", toy=True))
        setup = make(problem)
        ours, eager = (setup.forward(name)()[0] for name in ("reference", "eager"))
        assert ours.shape == eager.shape
        # discounted_loss is a few numbers: launches are what counts
        assert (bytes_moved(problem, ops.declaration(op).directions[-1]) > 0) == (op != "discounted_loss")


def test_groups_have_names_of_their_own():
    found = [group.name for group in ops.groups("denoise_step", CPU)]
    assert len(found) == len(set(found))
    assert "cpu-sd15-float32-noise_given-both" in found
    assert "cpu-beyond-cache-float32-noise_drawn-backward" in found
    assert next(ops.groups("denoise_step", CPU)).contenders[:2] == ("eager", "compile")
    first = next(ops.groups("philox", TOY))
    assert first.name == "cpu-sd15-float32-noise_drawn-forward"
    assert first.contenders[0] == "eager"
    assert len(list(ops.groups("posterior_mean", CPU))) == 12


def test_the_models_of_the_training_step_suit_the_device_unless_they_are_chosen():
    def models(*choice):
        return [group.fields["size"] for group in registry.BENCHMARKS[-1].groups(Choice(*choice))]

    assert models("cpu", False) == ["shapes"]
    assert models("cuda", False) == ["sd15", "sdxl"]
    assert models("cpu", True, ("sdxl",)) == ["sdxl"]


def test_sizes_are_those_of_the_models_and_the_largest_stays_below_32_mib_a_tensor():
    shapes = {problem.size: problem for problem in problems("denoise_step", "cpu", toy=False)}
    assert shapes["sd15"].shape == (8, 4, 64, 64)
    assert shapes["sdxl"].shape == (4, 4, 128, 128)
    assert shapes["video"].shape == (1, 16, 13, 60, 90)
    # d policy has two halves
    assert 2 * shapes["beyond-cache"].elements * 4 < 32 * 2**20


def test_cuda_is_measured_in_bfloat16_too_and_moves_a_quarter_gigabyte():
    found = {(problem.size, problem.dtype) for problem in problems("posterior_mean", "cuda", toy=False)}
    assert ("beyond-cache", torch.bfloat16) in found
    assert ("beyond-cache", torch.float32) in found
    large = [problem for problem in problems("posterior_mean", "cuda", toy=False) if problem.size == "beyond-cache"]
    assert min(bytes_moved(problem, way) for problem in large for way in ("forward", "backward", "both")) >= 256e6


def test_what_cannot_run_is_not_collected(monkeypatch):
    reasons = {"native": None, "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr(ops, "reason_against", lambda op, name, device, dtype: reasons[name])
    assert ops.implementations("denoise_step", "cpu") == ["eager", "compile", "native"]
    reasons["native"] = "the library is missing"
    assert ops.implementations("denoise_step", "cpu") == ["eager", "compile"]
    assert not [group for group in ops.groups("philox", TOY) if "native" in group.contenders]
    assert ops.absent("denoise_step", "native", "cpu") == "the library is missing"


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.devices("all") == ["cpu"]
    with pytest.raises(UserError, match="no device cuda on this machine: choose one of all, cpu"):
        machine.devices("cuda")


@pytest.mark.parametrize(
    ("device", "models", "said"),
    [
        ("cpu", "sd14", "model sd14 is not measured; allowed: shapes, sd15, sdxl"),
        ("tpu", "", "no device tpu on this machine: choose one of all, cpu"),
    ],
)
def test_what_is_asked_for_is_checked(monkeypatch, device, models, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location("bench_conftest", Path(registry.__file__).with_name("conftest.py"))
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    options = {"toy": True, "bench_device": device, "bench_models": models}
    config = SimpleNamespace(getoption=options.__getitem__)
    with pytest.raises(pytest.UsageError, match=said):
        conftest._choices(config)
    options |= {"bench_device": "all", "bench_models": "sd15,shapes"}
    assert conftest._choices(config) == [Choice("cpu", True, ("sd15", "shapes"))]
