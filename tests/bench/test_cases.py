from __future__ import annotations

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fused_ops import cases, setups
from fused_ops.traffic import bytes_moved
from record import FUSED_OPS
from support.kernel_targets import OPS

from sqdf_fast.errors import UserError

BENCH = Path(cases.__file__).parents[1]


def test_every_fused_op_is_measured_reported_and_filed():
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    files = "".join(path.read_text(encoding="utf-8") for path in BENCH.glob("test_*.py"))
    for listed in (FUSED_OPS, conftest.OPS, re.findall(r'^OP = "(\w+)"$', files, re.MULTILINE)):
        assert sorted(listed) == sorted(OPS)
    for op in OPS:
        problem = next(cases.cases(op, ["cpu"], toy=True)).problem
        setup = setups.make(problem)
        ours, eager = (setups.forward(setup, name)()[0] for name in ("reference", "eager"))
        assert ours.shape == eager.shape
        assert (bytes_moved(problem, "both") > 0) == (
            op != "discounted_loss"
        )  # a few numbers: launches are what counts


def test_rows_and_their_names():
    found = [case.id for case in cases.cases("denoise_step", ["cpu"], toy=False)]
    assert len(found) == len(set(found))
    assert "cpu-sd15-float32-noise_given-both-eager" in found
    assert "cpu-beyond-cache-float32-noise_drawn-backward-compile" in found
    first = next(cases.cases("philox", ["cpu"], toy=True))
    assert first.id == "cpu-sd15-float32-noise_drawn-forward-eager"


def test_the_implementations_of_a_row_follow_each_other():
    rows = [case.row for case in cases.cases("posterior_mean", ["cpu"], toy=False)]
    changes = sum(before != after for before, after in pairwise(rows))
    assert changes == len(set(rows)) - 1 == 11


def test_sizes_are_those_of_the_models_and_the_largest_stays_below_32_mib_a_tensor():
    shapes = {case.problem.size: case.problem for case in cases.cases("denoise_step", ["cpu"], toy=False)}
    assert shapes["sd15"].shape == (8, 4, 64, 64)
    assert shapes["sdxl"].shape == (4, 4, 128, 128)
    assert shapes["video"].shape == (1, 16, 13, 60, 90)
    # d policy has two halves
    assert 2 * shapes["beyond-cache"].elements * 4 < 32 * 2**20


def test_cuda_is_measured_in_bfloat16_too_and_moves_a_quarter_gigabyte():
    found = {(case.problem.size, case.problem.dtype) for case in cases.cases("posterior_mean", ["cuda"], toy=False)}
    assert ("beyond-cache", torch.bfloat16) in found
    assert ("beyond-cache", torch.float32) in found
    large = [case for case in cases.cases("posterior_mean", ["cuda"], toy=False) if case.problem.size == "beyond-cache"]
    assert min(bytes_moved(case.problem, case.direction) for case in large) >= 256e6


def test_what_cannot_run_is_not_collected(monkeypatch):
    reasons = {"native": None, "triton": "needs a GPU", "reference": None}
    monkeypatch.setattr(cases, "reason_against", lambda op, name, device, dtype: reasons[name])
    assert cases.implementations("denoise_step", "cpu") == ["eager", "compile", "native"]
    reasons["native"] = "the library is missing"
    assert cases.implementations("denoise_step", "cpu") == ["eager", "compile"]
    assert not [case for case in cases.cases("philox", ["cpu"], toy=True) if case.implementation == "native"]
    assert cases.absent("denoise_step", "native", "cpu") == "the library is missing"


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cases.devices("all") == ["cpu"]
    with pytest.raises(UserError, match="cuda is not there: choose one of all, cpu"):
        cases.devices("cuda")
