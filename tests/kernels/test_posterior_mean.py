"""posterior_mean against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import posterior_mean

POSTERIOR = torch.tensor([[14.6, -14.57], [1.1, -0.45], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
BUDGET = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(shape, dtype=torch.float64, *, batch=4, guided=True, seed=0):
    """x, network output and index."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    output = torch.randn(batch * (2 if guided else 1), *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), output.to(dtype), torch.tensor([3, 0, 2, 1, 0])[:batch]


def define(x, output, index, g):
    """x0_hat in float64, from the definition."""
    x, output = x.double(), output.double()
    rows = []
    for i, (a, b) in enumerate(POSTERIOR[index].tolist()):
        m = output[i] if g == 1 else (1 - g) * output[i] + g * output[len(x) + i]
        rows.append(a * x[i] + b * m)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", [(1,), (127,), (16384 + 3,), (7, 5), (4, 9, 11), (3, 2, 5, 7)], ids=str)
@pytest.mark.parametrize("g", [1.0, 5.0, 0.0])
def test_equals_definition(shape, dtype, g):
    x, output, index = make(shape, dtype, guided=g != 1)
    x0 = posterior_mean(x, output, POSTERIOR, index, guidance_scale=g)
    expected = define(x, output, index, g)
    assert x0.dtype == dtype
    error = (x0.double() - expected).flatten(1).norm(dim=1)
    # a x and b m may cancel: the error is relative to what is added up
    scale = define(x.abs(), torch.zeros_like(output), index, g).flatten(1).norm(dim=1) + expected.flatten(1).norm(dim=1)
    assert (error <= BUDGET[dtype] * scale).all()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    g=st.sampled_from([1.0, 3.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, batch, g, seed):
    x, output, index = make(tuple(shape), batch=batch, guided=g != 1, seed=seed)
    x0 = posterior_mean(x, output, POSTERIOR, index, guidance_scale=g)
    torch.testing.assert_close(x0, define(x, output, index, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_gradients(g):
    x, output, index = make((2, 3), guided=g != 1)

    def mean(x, output):
        return posterior_mean(x, output, POSTERIOR, index, guidance_scale=g)

    assert torch.autograd.gradcheck(mean, (x.requires_grad_(), output.requires_grad_()))


def test_gradient_of_each_input():
    x, output, index = make((5,), guided=True)
    x.requires_grad_()
    output.requires_grad_()
    cotangent = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view_as(x)
    posterior_mean(x, output, POSTERIOR, index, guidance_scale=3.0).backward(cotangent)
    a, b = (c[:, None] for c in POSTERIOR[index].unbind(1))
    torch.testing.assert_close(x.grad, a * cotangent)
    torch.testing.assert_close(output.grad[:4], -2 * b * cotangent)
    torch.testing.assert_close(output.grad[4:], 3 * b * cotangent)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_row_without_b_never_reads_the_network_output(g):
    x, output, index = make((3, 5), guided=g != 1)
    output[0] = torch.nan  # index[0] is the identity row
    if g != 1:
        output[4] = torch.inf
    x.requires_grad_()
    output.requires_grad_()
    x0 = posterior_mean(x, output, POSTERIOR, index, guidance_scale=g)
    assert torch.equal(x0[0], x[0])
    x0.sum().backward()
    assert torch.equal(x.grad[0], torch.ones_like(x[0]))
    assert torch.isfinite(output.grad).all()
    assert torch.equal(output.grad[0], torch.zeros_like(x[0]))
    assert torch.isfinite(x0).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_out_dtype(out_dtype):
    x, output, index = make((4, 8, 8), torch.float32)
    output = output.bfloat16()
    x0 = posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0, out_dtype=out_dtype)
    expected = posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0)
    assert expected.dtype == torch.float32
    assert x0.dtype == out_dtype
    assert torch.equal(x0, expected.to(out_dtype))


def strided(t):
    """The same values behind other strides."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize(
    "layout", [lambda t: t.to(memory_format=torch.channels_last), strided], ids=["channels_last", "strided"]
)
def test_memory_layout(layout):
    x, output, index = make((4, 6, 5))
    expected = posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0)
    x0 = posterior_mean(layout(x), layout(output), POSTERIOR, index, guidance_scale=5.0)
    assert torch.equal(x0, expected)


def test_row_does_not_depend_on_its_neighbours():
    x, output, index = make((16384 + 3,), torch.float32)
    x0 = posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0)
    rows = torch.tensor([2, 1])
    part = posterior_mean(x[rows], output[torch.cat([rows, rows + 4])], POSTERIOR, index[rows], guidance_scale=5.0)
    assert torch.equal(part, x0[rows])


def test_two_columns_of_a_transition_table():
    x, output, index = make((4, 5), guided=False)
    table = torch.cat([POSTERIOR, torch.full((4, 1), torch.nan, dtype=torch.float64)], dim=1)
    assert torch.equal(posterior_mean(x, output, table[:, :2], index), posterior_mean(x, output, POSTERIOR, index))


def test_compiles_without_a_graph_break():
    x, output, index = make((4, 6, 5), torch.float32)
    output.requires_grad_()

    def loss(x, output):
        return posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0).square().sum()

    (expected_grad,) = torch.autograd.grad(loss(x, output), output)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, output)
    (grad,) = torch.autograd.grad(compiled, output)
    torch.testing.assert_close(compiled, loss(x, output))
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_output": torch.zeros(2, 4)}, "model_output has shape"),
        ({"posterior": torch.zeros(4, 3)}, "posterior is"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, "index is"),
        ({"out_dtype": torch.int64}, "out_dtype"),
        ({"x": torch.zeros(0, 4)}, "x has shape"),
        ({"impl": "fast"}, "choose one of"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    arguments = {
        "x": torch.zeros(2, 4),
        "model_output": torch.zeros(4, 4),
        "posterior": POSTERIOR,
        "index": torch.zeros(2, dtype=torch.int64),
        "guidance_scale": 5.0,
    }
    with pytest.raises(UserError, match=message) as caught:
        posterior_mean(**{**arguments, **change})
    assert "\n" not in str(caught.value)
