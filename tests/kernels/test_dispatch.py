"""Which implementation of an op runs, and what it says when it cannot."""

from __future__ import annotations

import logging
import types

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import discounted_loss, dispatch
from sqdf_fast.kernels.discounted_loss import op as discounted_loss_op

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def forget():
    """Choices are made once a process; a test starts and ends without any."""
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


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
    one, k = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    chosen = types.SimpleNamespace(
        unavailable=lambda device, dtype: None if dtype == FLOAT else "float32 only",
        forward=lambda *arguments: (torch.tensor(42.0), torch.zeros(2), torch.zeros(2)),
    )
    module = dispatch.module
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name if "native" in name else None)
    for place in (dispatch, discounted_loss_op):
        monkeypatch.setattr(place, "module", lambda op, name: chosen if name == "native" else module(op, name))
    assert discounted_loss(one, one, k, gamma=1.0, alpha=0.0, impl="native").item() == 42.0
    assert discounted_loss(one.double(), one.double(), k, gamma=1.0, alpha=0.0).item() == -1.0
    with pytest.raises(UserError, match="float32 only"):
        discounted_loss(one.double(), one.double(), k, gamma=1.0, alpha=0.0, impl="native")
