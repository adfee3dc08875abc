"""discounted_loss against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_targets import Target, assert_within_budget, slow_when_interpreted, without_gradient

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import discounted_loss

OP = "discounted_loss"


def make(shape, dtype, seed=0):
    """reward (both signs), kl and remaining, on the CPU."""
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


def run(target, reward, kl, remaining, **settings):
    """The loss and its gradients with respect to reward and kl, by a target, on the CPU."""
    reward, kl, remaining = (t.detach().to(target.device) for t in (reward, kl, remaining))
    inputs = reward.requires_grad_(), kl.requires_grad_()
    loss = discounted_loss(*inputs, remaining, impl=target.impl, **settings)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, inputs))]


def define_gradients(reward, remaining, gamma, alpha, mask, denominator):
    kept = torch.where(reward > 0, 1.0, 0.0).double() if mask else torch.ones_like(reward, dtype=torch.float64)
    total = reward.numel() if denominator is None else denominator
    return -kept * torch.pow(torch.tensor(gamma, dtype=torch.float64), remaining) / total, kept * alpha / total


def tolerance(dtype):
    """Sums are in float32 whatever the inputs; the inputs of both sides are the same rounded ones."""
    return 1e-12 if dtype == torch.float64 else 2e-6


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1, 4), (16, 33)], ids=str)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("denominator", [None, 11])
def test_equals_definition(target, dtype, shape, mask, denominator):
    reward, kl, remaining = make(shape, dtype)
    settings = {"gamma": 0.9, "alpha": 2.0, "mask_nonpositive": mask, "denominator": denominator}
    loss, grad_reward, grad_kl = run(target, reward, kl, remaining, **settings)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = define(reward, kl, remaining, 0.9, 2.0, mask, denominator)
    # terms of both signs cancel: the error of a sum is relative to them
    terms = define(reward.abs(), kl, remaining, 0.9, 2.0, False, denominator)
    assert loss.item() == pytest.approx(expected, rel=tolerance(dtype), abs=tolerance(dtype) * abs(terms))
    truth = define_gradients(reward, remaining, 0.9, 2.0, mask, denominator)
    for grad, expected in zip((grad_reward, grad_kl), truth, strict=True):
        assert grad.dtype == dtype
        assert_within_budget(grad.reshape(1, -1), expected.reshape(1, -1), dtype)


@settings(deadline=None, max_examples=30)
@given(
    samples=st.integers(1, 9),
    rows=st.none() | st.integers(1, 4),
    gamma=st.floats(0.5, 1.0),
    alpha=st.floats(0.0, 10.0),
    mask=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_setting(target, samples, rows, gamma, alpha, mask, seed):
    shape = (samples,) if rows is None else (rows, samples)
    reward, kl, remaining = make(shape, target.dtype, seed=seed)
    loss, *_ = run(target, reward, kl, remaining, gamma=gamma, alpha=alpha, mask_nonpositive=mask)
    expected = define(reward, kl, remaining, gamma, alpha, mask, None)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_of_the_reference(shape, mask):
    reward, kl, remaining = make(shape, torch.float64)

    def loss(reward, kl):
        return discounted_loss(reward, kl, remaining, gamma=0.9, alpha=2.0, mask_nonpositive=mask)

    assert torch.autograd.gradcheck(loss, (reward.requires_grad_(), kl.requires_grad_()))


def check_gradient_paths(target):
    """By hand: -gamma^k / denominator and alpha / denominator, nothing for the masked sample."""
    reward, kl = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3])
    settings = {"gamma": 0.5, "alpha": 3.0, "mask_nonpositive": True, "denominator": 4}
    _, grad_reward, grad_kl = run(target, reward, kl, torch.tensor([0, 1, 2]), **settings)
    assert grad_reward.tolist() == pytest.approx([-0.25, 0.0, -0.0625], rel=1e-6)
    assert grad_kl.tolist() == [0.75, 0.0, 0.75]


def test_gradient_values(target):
    check_gradient_paths(target)


@pytest.mark.parametrize("path", ["d reward", "d kl"])
def test_a_cut_gradient_path_is_noticed(target, path, monkeypatch):
    """The check that `test_gradient_values` makes fails when a path is missing."""
    whole = discounted_loss

    def mutated(reward, kl, *arguments, **keywords):
        reward, kl = (without_gradient(reward), kl) if path == "d reward" else (reward, without_gradient(kl))
        return whole(reward, kl, *arguments, **keywords)

    monkeypatch.setitem(run.__globals__, "discounted_loss", mutated)
    with pytest.raises(AssertionError):
        check_gradient_paths(target)


def test_a_cotangent_scales_both_gradients(target):
    reward, kl, remaining = (t.to(target.device) for t in make((5,), target.dtype))
    loss = discounted_loss(
        reward.requires_grad_(), kl.requires_grad_(), remaining, gamma=0.9, alpha=2.0, impl=target.impl
    )
    (3 * loss).backward()
    _, grad_reward, grad_kl = run(target, reward, kl, remaining, gamma=0.9, alpha=2.0)
    torch.testing.assert_close(reward.grad.cpu(), 3 * grad_reward)
    torch.testing.assert_close(kl.grad.cpu(), 3 * grad_kl)


@pytest.mark.parametrize("masked", [False, True])
def test_two_timesteps_by_hand(target, masked):
    reward = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float16)
    kl, remaining = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[0, 1], [2, 3]])
    settings = {"gamma": 0.5, "alpha": 0.1, "mask_nonpositive": masked, "denominator": 8.0}
    loss, grad_reward, grad_kl = run(target, reward, kl, remaining, **settings)
    keep = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) if masked else torch.ones(2, 2)
    weight = torch.tensor([[1.0, 0.5], [0.25, 0.125]])
    torch.testing.assert_close(loss, (keep * (0.1 * kl - weight * reward.float())).sum() / 8)
    assert torch.equal(grad_reward.float(), -keep * weight / 8)
    torch.testing.assert_close(grad_kl, keep * 0.1 / 8, rtol=1e-7, atol=0)


def test_mask_is_off_by_default_and_keeps_out_a_masked_sample_whole(target):
    reward, kl = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([torch.nan, 5.0, 1.0])
    remaining = torch.zeros(3, dtype=torch.int64)
    assert math.isnan(run(target, reward, kl, remaining, gamma=1.0, alpha=1.0)[0].item())
    loss, _, grad_kl = run(target, reward, kl, remaining, gamma=1.0, alpha=1.0, mask_nonpositive=True)
    assert loss.item() == pytest.approx(-1 / 3)
    assert grad_kl.tolist() == pytest.approx([0, 0, 1 / 3])


def test_a_reward_that_is_not_a_number_is_not_masked_away(target):
    """NaN is not <= 0: hiding a broken reward would be worse than showing it."""
    reward, zeros = torch.tensor([torch.nan, 1.0]), torch.zeros(2)
    loss, *_ = run(target, reward, zeros, zeros.long(), gamma=1.0, alpha=1.0, mask_nonpositive=True)
    assert math.isnan(loss.item())


@pytest.mark.parametrize("cuts", [[10], [1, 9], [3, 3, 4], [7, 2, 1]], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_uneven_micro_batches_add_up(target, cuts, mask):
    reward, kl, remaining = make((10,), target.dtype)
    settings = {"gamma": 0.9, "alpha": 2.0, "mask_nonpositive": mask}
    whole = run(target, reward, kl, remaining, **settings)
    parts = [
        run(target, *part, denominator=10, **settings)
        for part in zip(reward.split(cuts), kl.split(cuts), remaining.split(cuts), strict=True)
    ]
    total = [sum(part[0] for part in parts), *(torch.cat([part[i] for part in parts]) for i in (1, 2))]
    for value, expected in zip(total, whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance(target.dtype), atol=tolerance(target.dtype))


def test_several_timesteps_a_sample(target):
    """[K, B] counts every entry: the same as the K B samples in a row, in any memory layout."""
    reward, kl, remaining = make((3, 4), target.dtype)
    settings = {"gamma": 0.9, "alpha": 2.0}
    flat = run(target, reward.flatten(), kl.flatten(), remaining.flatten(), **settings)
    for found in (
        run(target, reward, kl, remaining, **settings),
        [t if t.ndim == 0 else t.t() for t in run(target, reward.t(), kl.t(), remaining.t(), **settings)],
    ):
        for value, expected in zip(found, flat, strict=True):
            torch.testing.assert_close(value.flatten(), expected.flatten())


def test_mixed_dtypes_add_up_in_float32(target):
    reward = torch.full((4096,), 1.0009765625, dtype=torch.float16)
    loss, grad_reward, grad_kl = run(
        target, reward, torch.zeros(4096), torch.zeros(4096, dtype=torch.int64), gamma=0.9, alpha=1.0
    )
    assert loss.dtype == grad_kl.dtype == torch.float32
    assert grad_reward.dtype == torch.float16
    assert loss.item() == pytest.approx(-1.0009765625, rel=1e-6)


@slow_when_interpreted
def test_compiles_without_a_graph_break(target):
    reward, kl, remaining = (t.to(target.device) for t in make((5,), torch.float32))
    reward.requires_grad_()

    def loss(reward, kl, remaining):
        settings = {"gamma": 0.9, "alpha": 2.0, "mask_nonpositive": True, "impl": target.impl}
        return 2 * discounted_loss(reward, kl, remaining, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(reward, kl, remaining)
    torch.testing.assert_close(compiled, loss(reward, kl, remaining))
    (grad,) = torch.autograd.grad(compiled, reward)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(reward, kl, remaining), reward)[0])


@slow_when_interpreted
def test_a_changing_coefficient_compiles_too(target):
    """alpha, gamma and the denominator of a schedule of theirs: one graph each time, and the eager values."""
    torch.compiler.reset()
    terms = [t.to(target.device) for t in make((5,), torch.float32)]

    def loss(reward, kl, remaining, alpha, gamma, denominator):
        settings = {"gamma": gamma, "alpha": alpha, "denominator": denominator, "impl": target.impl}
        return discounted_loss(reward, kl, remaining, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for values in ((2.0, 0.9, 5), (1.5, 0.8, 6), (1.25, 0.7, 7.5)):
        torch.testing.assert_close(compiled(*terms, *values), loss(*terms, *values))


def test_native_is_the_reference_on_a_cpu():
    """A run of native kernels needs no C++ for a few numbers."""
    reward, kl, remaining = make((9,), torch.float32)
    losses = [discounted_loss(reward, kl, remaining, gamma=0.9, alpha=2.0, impl=i) for i in ("native", "reference")]
    assert torch.equal(*losses)
    with pytest.raises(UserError, match="impl='native' of discounted_loss cannot run here"):
        discounted_loss(*(t.to("meta") for t in (reward, kl, remaining)), gamma=0.9, alpha=2.0, impl="native")


def test_the_reference_adds_up_in_float64():
    """So that the loss and its gradients are those of the numbers given, rounded once."""
    reward, kl, remaining = make((9,), torch.float32)
    settings = {"gamma": 0.97, "alpha": 0.0137, "denominator": 7}
    exact = run(Target("cpu", "reference"), reward.double(), kl.double(), remaining, **settings)
    found = run(Target("cpu", "reference"), reward, kl, remaining, **settings)
    for value, expected in zip(found, exact, strict=True):
        assert torch.equal(value, expected.float())


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
