"""discounted_loss against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import discounted_loss


def make(shape, dtype=torch.float64, seed=0):
    """reward (both signs), kl and remaining."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    kl = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return reward, kl, torch.randint(0, 50, shape, generator=generator)


def define(reward, kl, remaining, gamma, alpha, mask, denominator):
    """The loss from its definition, term by term."""
    total = 0.0
    for r, d, k in zip(reward.flatten().tolist(), kl.flatten().tolist(), remaining.flatten().tolist(), strict=True):
        if mask and r <= 0:
            continue
        total += -(gamma**k) * r + alpha * d
    return total / (reward.numel() if denominator is None else denominator)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("denominator", [None, 11])
def test_equals_definition(shape, dtype, mask, denominator):
    reward, kl, remaining = make(shape, dtype)
    loss = discounted_loss(reward, kl, remaining, gamma=0.9, alpha=2.0, mask_nonpositive=mask, denominator=denominator)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = define(reward, kl, remaining, 0.9, 2.0, mask, denominator)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 9),
    rows=st.none() | st.integers(1, 4),
    gamma=st.floats(0.05, 1.0),
    alpha=st.floats(0.0, 10.0),
    mask=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_setting(samples, rows, gamma, alpha, mask, seed):
    shape = (samples,) if rows is None else (rows, samples)
    reward, kl, remaining = make(shape, seed=seed)
    loss = discounted_loss(reward, kl, remaining, gamma=gamma, alpha=alpha, mask_nonpositive=mask)
    expected = define(reward, kl, remaining, gamma, alpha, mask, None)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_gradients(shape, mask):
    reward, kl, remaining = make(shape)

    def loss(reward, kl):
        return discounted_loss(reward, kl, remaining, gamma=0.9, alpha=2.0, mask_nonpositive=mask)

    assert torch.autograd.gradcheck(loss, (reward.requires_grad_(), kl.requires_grad_()))


def test_gradient_values():
    reward = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    remaining = torch.tensor([0, 1, 2])
    discounted_loss(reward, kl, remaining, gamma=0.5, alpha=3.0, mask_nonpositive=True, denominator=4).backward()
    assert reward.grad.tolist() == [-0.25, 0.0, -0.0625]
    assert kl.grad.tolist() == [0.75, 0.0, 0.75]


def test_mask_is_off_by_default_and_keeps_out_a_masked_sample_whole():
    reward = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    kl = torch.tensor([torch.nan, 5.0, 1.0], dtype=torch.float64)
    remaining = torch.zeros(3, dtype=torch.int64)
    assert math.isnan(discounted_loss(reward, kl, remaining, gamma=1.0, alpha=1.0).item())
    kl.requires_grad_()
    masked = discounted_loss(reward, kl, remaining, gamma=1.0, alpha=1.0, mask_nonpositive=True)
    assert masked.item() == pytest.approx(-1 / 3)
    masked.backward()
    assert kl.grad.tolist() == pytest.approx([0, 0, 1 / 3])


@pytest.mark.parametrize("cuts", [[10], [1, 9], [3, 3, 4], [7, 2, 1]], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_uneven_micro_batches_add_up(cuts, mask):
    reward, kl, remaining = make((10,))
    reward.requires_grad_()
    kl.requires_grad_()
    settings = {"gamma": 0.9, "alpha": 2.0, "mask_nonpositive": mask}
    whole = discounted_loss(reward, kl, remaining, **settings)
    whole_grads = torch.autograd.grad(whole, (reward, kl))
    parts = [
        discounted_loss(r, d, k, denominator=10, **settings)
        for r, d, k in zip(reward.split(cuts), kl.split(cuts), remaining.split(cuts), strict=True)
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(total, (reward, kl)), whole_grads, rtol=1e-13, atol=1e-14)


def test_several_timesteps_a_sample():
    """[K, B] counts every entry: the same as the K B samples in a row."""
    reward, kl, remaining = make((3, 4))
    settings = {"gamma": 0.9, "alpha": 2.0}
    flat = discounted_loss(reward.flatten(), kl.flatten(), remaining.flatten(), **settings)
    torch.testing.assert_close(discounted_loss(reward, kl, remaining, **settings), flat)
    transposed = discounted_loss(reward.t(), kl.t(), remaining.t(), **settings)
    torch.testing.assert_close(transposed, flat)


def test_mixed_dtypes_add_up_in_float32():
    reward = torch.full((4096,), 1.0009765625, dtype=torch.float16)
    kl = torch.zeros(4096)
    loss = discounted_loss(reward, kl, torch.zeros(4096, dtype=torch.int64), gamma=0.9, alpha=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-1.0009765625, rel=1e-6)


def test_compiles_without_a_graph_break():
    reward, kl, remaining = make((5,), torch.float32)

    def loss(reward, kl, remaining):
        return discounted_loss(reward, kl, remaining, gamma=0.9, alpha=2.0, mask_nonpositive=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(reward, kl, remaining)
    torch.testing.assert_close(compiled, loss(reward, kl, remaining))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"denominator": 0}, "denominator=0"),
        ({"kl": torch.zeros(3)}, "kl"),
        ({"remaining": torch.zeros(4)}, "remaining is torch.float32"),
        ({"reward": torch.zeros(4, dtype=torch.int64)}, "reward is torch.int64"),
        ({"reward": torch.zeros(2, 2, 1)}, "one shape"),
        ({"impl": "fast"}, "choose one of"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    arguments = {
        "reward": torch.zeros(4),
        "kl": torch.zeros(4),
        "remaining": torch.zeros(4, dtype=torch.int64),
        "gamma": 0.9,
        "alpha": 1.0,
    }
    with pytest.raises(UserError, match=message) as caught:
        discounted_loss(**{**arguments, **change})
    assert "\n" not in str(caught.value)
