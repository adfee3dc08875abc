"""Which implementation of an op runs, and what it says when it cannot."""

from __future__ import annotations

import logging
import types

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import dispatch, operators, posterior_mean
from sqdf_fast.kernels.posterior_mean import op as posterior_mean_op

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def forget():
    """Choices are made once a process; a test starts and ends without any."""
    for choice in (dispatch._resolve, dispatch.fused):
        choice.cache_clear()
    yield
    for choice in (dispatch._resolve, dispatch.fused):
        choice.cache_clear()


@pytest.mark.parametrize("op", ["denoise_step", "posterior_mean", "discounted_loss"])
def test_reference_always_runs(op):
    assert dispatch.resolve(op, "reference", CPU, torch.float64) == "reference"
    assert dispatch.reason_against(op, "reference", CPU, torch.float64) is None


def test_unknown_choice():
    with pytest.raises(UserError, match="impl='cuda' is not an implementation of denoise_step"):
        dispatch.resolve("denoise_step", "cuda", CPU, FLOAT)


def test_order_of_auto_and_the_logged_reason(forget, monkeypatch, caplog):
    reasons = {"triton": "no GPU", "native": None, "reference": None}
    monkeypatch.setattr(dispatch, "reason_against", lambda op, name, device, dtype: reasons[name])
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve("denoise_step", "auto", CPU, FLOAT) == "native"
        assert dispatch.resolve("denoise_step", "auto", CPU, FLOAT) == "native"
    assert [record.message for record in caplog.records] == ["denoise_step on cpu takes native (triton: no GPU)"]


def test_the_reference_on_a_gpu_is_worth_a_warning(forget, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "reason_against", lambda op, name, *_: None if name == "reference" else "not here")
    assert dispatch.resolve("denoise_step", "auto", torch.device("cuda"), FLOAT) == "reference"
    assert dispatch.resolve("denoise_step", "auto", CPU, FLOAT) == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_explicit_choice_never_falls_back(forget, monkeypatch):
    monkeypatch.setattr(dispatch, "reason_against", lambda op, name, device, dtype: "no GPU")
    with pytest.raises(UserError, match="impl='triton' of denoise_step cannot run here: no GPU"):
        dispatch.resolve("denoise_step", "triton", CPU, FLOAT)


def test_the_chosen_module_runs(forget, monkeypatch):
    """The dispatcher's answer is what computes; float64 falls back to the reference, an explicit choice does not."""
    x, table, index = torch.ones(2, 3), torch.tensor([[2.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    chosen = types.SimpleNamespace(
        unavailable=lambda device, dtype: None if dtype == FLOAT else "float32 only",
        forward=lambda *arguments: torch.full((2, 3), 42.0),
    )
    module = dispatch.module
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name if "native" in name else None)
    for place in (dispatch, operators):
        monkeypatch.setattr(place, "module", lambda op, name: chosen if name == "native" else module(op, name))
    monkeypatch.setattr(posterior_mean_op.posterior_mean, "_modules", {})
    assert (posterior_mean(x, x, table, index, impl="native") == 42).all()
    assert (posterior_mean(x.double(), x, table, index) == 3).all()
    with pytest.raises(UserError, match="float32 only"):
        posterior_mean(x.double(), x, table, index, impl="native")


def test_a_device_has_one_fused_kernel(forget, monkeypatch):
    """Under Triton's interpreter the CPU's is Triton's; asking for the other one is an error, never a silent change."""
    reasons = {"triton": None, "native": None, "reference": None}
    monkeypatch.setattr(dispatch, "reason_against", lambda op, name, device, dtype: reasons[name])
    assert dispatch.fused("denoise_step", "cpu") == "triton"
    assert dispatch.resolve("denoise_step", "triton", CPU, FLOAT) == "triton"
    assert dispatch.resolve("denoise_step", "reference", CPU, FLOAT) == "reference"
    with pytest.raises(UserError, match="impl='native' of denoise_step cannot run here: triton takes its place"):
        dispatch.resolve("denoise_step", "native", CPU, FLOAT)


def test_a_device_without_a_fused_kernel_is_one_clear_line(forget):
    with pytest.raises(UserError, match="discounted_loss has no fused kernel that runs on meta; use impl='reference'"):
        dispatch.fused("discounted_loss", "meta")


def test_no_such_implementation():
    assert dispatch.reason_against("discounted_loss", "native", CPU, FLOAT) == (
        "discounted_loss has no such implementation"
    )
