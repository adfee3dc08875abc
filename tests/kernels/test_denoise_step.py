"""denoise_step against its definition, written out sample by sample in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import denoise_step, denoise_step_staged, denoise_step_vjp, philox_normal

TRANSITION = torch.tensor(
    [[1.02, -0.031, 0.17], [1.4, -0.62, 0.29], [0.97, 0.11, 0.043], [1.0, -0.02, 0.0]], dtype=torch.float64
)
SHAPES = [(1,), (127,), (16384 + 3,), (7, 5), (4, 9, 11), (3, 2, 5, 7)]
BUDGET = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(shape, dtype=torch.float64, *, batch=3, guided=True, difference=1.0, seed=0):
    """x, policy, reference, noise and index; the network outputs are `difference` apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows):
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    rows = 2 * batch if guided else batch
    reference = normal(rows)
    policy = reference + difference * normal(rows)
    index = torch.tensor([2, 0, 1, 1, 0])[:batch]
    return [t.to(dtype) for t in (normal(batch), policy, reference, normal(batch))] + [index]


def define(x, policy, reference, noise, index, g, kl_scale=1.0):
    """x_prev and kl in float64, from the definition."""
    x, policy, reference, noise = (t.double() for t in (x, policy, reference, noise))
    batch = len(x)
    x_prev, kl = [], []
    for b in range(batch):
        p, q, sigma = TRANSITION[index[b]].tolist()
        if g == 1:
            m, m_ref = policy[b], reference[b]
        else:
            m = (1 - g) * policy[b] + g * policy[batch + b]
            m_ref = (1 - g) * reference[b] + g * reference[batch + b]
        x_prev.append(p * x[b] + q * m + sigma * noise[b])
        kl.append(kl_scale * ((q * (m - m_ref) / sigma) ** 2).mean())
    return torch.stack(x_prev), torch.stack(kl)


def relative_error(value, truth):
    """Relative L2 error of each sample."""
    value, truth = value.double().reshape(len(truth), -1), truth.reshape(len(truth), -1)
    return (value - truth).norm(dim=1) / truth.norm(dim=1)


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("g", [1.0, 5.0, 0.0])
def test_equals_definition(shape, dtype, g):
    x, policy, reference, noise, index = make(shape, dtype, guided=g != 1)
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=g, noise=noise, kl_scale=0.5)
    expected_x_prev, expected_kl = define(x, policy, reference, noise, index, g, kl_scale=0.5)
    assert x_prev.dtype == dtype
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (relative_error(x_prev, expected_x_prev) <= BUDGET[dtype]).all()
    # the KL is never rounded to half precision
    assert (relative_error(kl, expected_kl) <= (1e-13 if dtype == torch.float64 else 2e-6)).all()


def test_small_kl_keeps_its_digits():
    """Outputs a thousandth apart, as in a real run: the KL is about 2e-5 and still right to five digits."""
    x, policy, reference, noise, index = make((4, 16, 16), torch.float32, difference=1e-3)
    _, kl = denoise_step(x, policy, reference, TRANSITION.float(), index, guidance_scale=5.0, noise=noise)
    _, expected = define(x, policy, reference, noise, index, 5.0)
    assert (relative_error(kl, expected) <= 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    g=st.sampled_from([1.0, 3.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, batch, g, seed):
    x, policy, reference, noise, index = make(tuple(shape), batch=batch, guided=g != 1, seed=seed)
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=g, noise=noise)
    expected_x_prev, expected_kl = define(x, policy, reference, noise, index, g)
    torch.testing.assert_close(x_prev, expected_x_prev, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_gradients(g):
    x, policy, reference, noise, index = make((2, 3), guided=g != 1)
    x.requires_grad_()
    policy.requires_grad_()

    def step(x, policy):
        return denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=g, noise=noise)

    assert torch.autograd.gradcheck(step, (x, policy))


@pytest.mark.parametrize("path", ["x_prev", "kl"])
def test_gradient_of_each_path(path):
    """d x_prev and d kl alone, each guidance half: p, q (1 - g), q g and 2 q^2 / (sigma^2 N) delta."""
    g = 5.0
    x, policy, reference, noise, index = make((4, 3), guided=True)
    x.requires_grad_()
    policy.requires_grad_()
    reference.requires_grad_()
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=g, noise=noise)
    p, q, sigma = (c[:, None, None] for c in TRANSITION[index].unbind(1))
    cotangent = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view_as(x)
    if path == "x_prev":
        x_prev.backward(cotangent)
        expected_x, expected_m = p * cotangent, q * cotangent
    else:
        kl.backward(cotangent[:, 0, 0])
        delta = (policy - reference).detach()
        delta = (1 - g) * delta[:3] + g * delta[3:]
        expected_x = torch.zeros_like(x)
        expected_m = cotangent[:, :1, :1] * 2 * (q / sigma) ** 2 / 12 * delta
    x_grad = torch.zeros_like(x) if x.grad is None else x.grad
    torch.testing.assert_close(x_grad, expected_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(policy.grad[:3], (1 - g) * expected_m, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(policy.grad[3:], g * expected_m, rtol=1e-12, atol=1e-14)
    assert reference.grad is None


@pytest.mark.parametrize("g", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_staged_backward_equals_autograd(g, dtype):
    x, policy, reference, noise, index = make((3, 5, 5), dtype, guided=g != 1)
    policy.requires_grad_()
    arguments = {"guidance_scale": g, "kl_scale": 0.7}
    x_prev, kl, delta = denoise_step_staged(x, policy, reference, TRANSITION, index, noise=noise, **arguments)
    assert not delta.requires_grad
    generator = torch.Generator().manual_seed(1)
    grad_x_prev = torch.randn(x.shape, generator=generator, dtype=dtype)
    grad_kl = torch.randn(len(x), generator=generator, dtype=dtype)
    (expected,) = torch.autograd.grad((x_prev, kl), policy, (grad_x_prev, grad_kl))
    grad = denoise_step_vjp(grad_x_prev, grad_kl, delta, TRANSITION, index, **arguments)
    assert grad.dtype == dtype
    assert (relative_error(grad, expected.double()) <= BUDGET[dtype]).all()


def test_staged_equals_plain():
    x, policy, reference, noise, index = make((3, 5, 5))
    plain = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    *staged, delta = denoise_step_staged(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    assert torch.equal(plain[0], staged[0])
    assert torch.equal(plain[1], staged[1])
    difference = policy - reference
    torch.testing.assert_close(delta, difference[:3] + 5 * (difference[3:] - difference[:3]))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_equal_policy_and_reference(dtype):
    """KL exactly 0 with an exactly zero gradient, in every dtype and where sigma is 0."""
    x, policy, _, noise, _ = make((4, 33), dtype, difference=0.0)
    policy.requires_grad_()
    index = torch.tensor([0, 3, 2])
    _, kl = denoise_step(x, policy, policy, TRANSITION, index, guidance_scale=5.0, noise=noise)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(policy.grad, torch.zeros_like(policy))


def test_deterministic_rows():
    """sigma = 0: different outputs are infinitely far, equal ones not at all; q = 0: m does not matter."""
    table = torch.tensor([[0.9, -0.3, 0.0], [0.9, 0.0, 0.0], [0.9, 0.0, 0.5]], dtype=torch.float64)
    x, policy, reference, noise, _ = make((5,), guided=False)
    x_prev, kl = denoise_step(x, policy, reference, table, torch.tensor([0, 1, 2]), noise=noise)
    assert kl.tolist() == [float("inf"), 0.0, 0.0]
    torch.testing.assert_close(x_prev[0], 0.9 * x[0] - 0.3 * policy[0])
    torch.testing.assert_close(x_prev[1], 0.9 * x[1])
    grad = denoise_step_vjp(
        torch.zeros_like(x),
        torch.ones(3, dtype=torch.float64),
        torch.zeros_like(x),
        table,
        torch.tensor([0, 1, 2]),
    )
    assert torch.equal(grad, torch.zeros_like(x))


def test_reference_gets_no_gradient():
    x, policy, reference, noise, index = make((4,))
    reference.requires_grad_()
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=2.0, noise=noise)
    assert not x_prev.requires_grad
    assert not kl.requires_grad


def test_mixed_dtypes():
    """Latents in float32, outputs in bfloat16: arithmetic in float32 on the bfloat16 values."""
    x, policy, reference, noise, index = make((4, 8, 8), torch.float32)
    policy, reference = policy.bfloat16().requires_grad_(), reference.bfloat16()
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    expected_x_prev, expected_kl = define(x, policy.detach(), reference, noise, index, 5.0)
    assert x_prev.dtype == torch.float32
    assert (relative_error(x_prev, expected_x_prev) <= 1e-6).all()
    assert (relative_error(kl, expected_kl) <= 2e-6).all()
    (x_prev.sum() + kl.sum()).backward()
    assert policy.grad.dtype == torch.bfloat16


def test_table_in_float32_or_float64():
    x, policy, reference, noise, index = make((4, 8, 8), torch.float32)
    double = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    single = denoise_step(x, policy, reference, TRANSITION.float(), index, guidance_scale=5.0, noise=noise)
    assert torch.equal(double[0], single[0])
    assert torch.equal(double[1], single[1])


def strided(t):
    """The same values behind other strides."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        strided,
    ],
    ids=["channels_last", "transposed", "strided"],
)
def test_memory_layout(layout):
    x, policy, reference, noise, index = make((4, 6, 5))
    expected = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    x, policy, reference, noise = (layout(t) for t in (x, policy, reference, noise))
    policy.requires_grad_()
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    torch.testing.assert_close(x_prev.detach(), expected[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(kl.detach(), expected[1], rtol=1e-13, atol=0)
    (x_prev.sum() + kl.sum()).backward()
    assert torch.isfinite(policy.grad).all()


def test_seed_draws_the_counter_based_noise():
    x, policy, reference, _, index = make((4, 6, 5), torch.float32)
    seed = torch.tensor([11, -3, 2**62])
    drawn = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, seed=seed)
    noise = philox_normal(seed, (4, 6, 5))
    given = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
    assert torch.equal(drawn[0], given[0])
    assert torch.equal(drawn[1], given[1])


@pytest.mark.parametrize("elements", [127, 16384 + 3])
def test_row_does_not_depend_on_its_neighbours(elements):
    x, policy, reference, _, index = make((elements,), torch.float32, batch=5)
    seed = torch.arange(5)
    x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, seed=seed)
    for rows in (torch.tensor([3]), torch.tensor([4, 1])):
        halves = torch.cat([rows, rows + 5])
        part = denoise_step(
            x[rows],
            policy[halves],
            reference[halves],
            TRANSITION,
            index[rows],
            guidance_scale=5.0,
            seed=seed[rows],
        )
        assert torch.equal(part[0], x_prev[rows])
        assert torch.equal(part[1], kl[rows])


def test_compiles_without_a_graph_break():
    x, policy, reference, noise, index = make((4, 6, 5), torch.float32)
    policy.requires_grad_()

    def loss(x, policy, reference, noise):
        x_prev, kl = denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=5.0, noise=noise)
        return x_prev.square().sum() + kl.sum()

    expected = loss(x, policy, reference, noise)
    (expected_grad,) = torch.autograd.grad(expected, policy)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, policy, reference, noise)
    (grad,) = torch.autograd.grad(compiled, policy)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "exactly one of noise and seed"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "exactly one of noise and seed"),
        ({"noise": None, "seed": torch.zeros(3)}, "seed is torch.float32"),
        ({"noise": torch.zeros(3, 5)}, "noise has shape"),
        ({"policy": torch.zeros(3, 4)}, "policy has shape"),
        ({"reference": torch.zeros(6, 5)}, "reference has shape"),
        ({"guidance_scale": 1.0}, "policy has shape"),
        ({"transition": torch.zeros(4, 2)}, "transition is"),
        ({"transition": torch.zeros(4, 3).half()}, "transition is"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "index is"),
        ({"index": torch.zeros(3)}, "index is"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(3)}, "x has shape"),
        ({"impl": "cuda"}, "choose one of auto, triton, native, reference"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    arguments = {
        "x": torch.zeros(3, 4),
        "policy": torch.zeros(6, 4),
        "reference": torch.zeros(6, 4),
        "transition": TRANSITION,
        "index": torch.zeros(3, dtype=torch.int64),
        "guidance_scale": 5.0,
        "noise": torch.zeros(3, 4),
    }
    with pytest.raises(UserError, match=message) as caught:
        denoise_step(**{**arguments, **change})
    assert "\n" not in str(caught.value)
