"""posterior_mean against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_targets import (
    Target,
    assert_within_budget,
    slow_interpreted,
    slow_when_interpreted,
    without_gradient,
)

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import posterior_mean, posterior_mean_vjp

POSTERIOR = torch.tensor([[14.6, -14.57], [1.1, -0.45], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)


def make(shape, dtype, *, guided=True, seed=0, index=(3, 0, 2, 1)):
    """x, network output and index, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(index), *shape, generator=generator, dtype=torch.float64)
    output = torch.randn(len(index) * (2 if guided else 1), *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), output.to(dtype), torch.tensor(index)


def define(x, output, index, g, table=POSTERIOR):
    """x0_hat in float64, from the definition."""
    x, output = x.double(), output.double()
    rows = []
    for i, (a, b) in enumerate(table[index].tolist()):
        m = output[i] if g == 1 else (1 - g) * output[i] + g * output[len(x) + i]
        rows.append(a * x[i] + b * m)
    return torch.stack(rows)


def differentiate(mean, x, output, grad):
    """x0_hat, and the gradients of x and the network output under the cotangent `grad`."""
    x, output = x.detach().requires_grad_(), output.detach().requires_grad_()
    x0 = mean(x, output)
    return [t.detach() for t in (x0, *torch.autograd.grad(x0, (x, output), grad))]


def run(target, x, output, index, g, grad, **keywords):
    """x0_hat, d x, d model_output of a target, on the CPU."""
    x, output, index, grad, table = (t.to(target.device) for t in (x, output, index, grad, POSTERIOR))

    def mean(x, output):
        return posterior_mean(x, output, table, index, guidance_scale=g, impl=target.impl, **keywords)

    return [t.cpu() for t in differentiate(mean, x, output, grad)]


def check(target, dtype, shape, g, **keywords):
    """Values and gradients of a target against the definition, inside the error budget of `dtype`."""
    x, output, index = make(shape, dtype, guided=g != 1, **keywords)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    truth = differentiate(lambda x, output: define(x, output, index, g), x.double(), output.double(), grad.double())
    found = run(target, x, output, index, g, grad)
    plain = run(Target("cpu", "reference"), x, output, index, g, grad)
    # of one element or a few, what is added up may cancel: an error is relative to the terms there
    sizes = output.abs() if g <= 1 else torch.cat([-output.abs()[: len(x)], output.abs()[len(x) :]])
    terms = define(x.abs(), sizes, index, g, POSTERIOR.abs()).flatten(1).norm(dim=1, keepdim=True)
    terms = terms if x[0].numel() < 100 else None
    for value, expected, reference in zip(found, truth, plain, strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, expected, dtype, reference if target.impl != "reference" else None, terms)
        terms = None


SHAPES = [(1,), (127,), pytest.param((16384 + 3,), marks=slow_interpreted), (7, 5), (4, 9, 11), (3, 2, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("g", [1.0, 5.0, 0.0])
def test_equals_definition(target, dtype, shape, g):
    check(target, dtype, shape, g)


@slow_when_interpreted
@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    index=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    g=st.sampled_from([1.0, 3.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(target, shape, index, g, seed):
    check(target, target.dtype, tuple(shape), g, index=tuple(index), seed=seed)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_gradients_of_the_reference(g):
    x, output, index = make((2, 3), torch.float64, guided=g != 1)

    def mean(x, output):
        return posterior_mean(x, output, POSTERIOR, index, guidance_scale=g)

    assert torch.autograd.gradcheck(mean, (x.requires_grad_(), output.requires_grad_()))


def check_gradient_paths(target):
    """a to x, b (1 - g) and b g to the halves of the network output."""
    x, output, index = make((5,), target.dtype)
    grad = torch.linspace(-1, 2, x.numel(), dtype=target.dtype).view_as(x)
    _, grad_x, grad_output = run(target, x, output, index, 3.0, grad)
    a, b = (c[:, None] for c in POSTERIOR[index].unbind(1))
    assert_within_budget(grad_x, a * grad, target.dtype)
    assert_within_budget(grad_output, torch.cat([-2 * b * grad, 3 * b * grad]), target.dtype)


def test_gradient_of_each_path(target):
    check_gradient_paths(target)


def mutated(path):
    """posterior_mean with one of its gradient paths cut."""
    whole = posterior_mean

    def mean(x, output, *arguments, **keywords):
        first, second = output.chunk(2)
        if path == "d x":
            x = without_gradient(x)
        elif path == "unconditional half":
            first = without_gradient(first)
        else:
            second = without_gradient(second)
        return whole(x, torch.cat([first, second]), *arguments, **keywords)

    return mean


@pytest.mark.parametrize("path", ["d x", "unconditional half", "conditional half"])
def test_a_cut_gradient_path_is_noticed(target, path, monkeypatch):
    """The check that `test_gradient_of_each_path` makes fails when any path is missing."""
    monkeypatch.setitem(run.__globals__, "posterior_mean", mutated(path))
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient_paths(target)


@pytest.mark.parametrize("wanted", [0, 1], ids=["x", "model_output"])
def test_only_one_input_needs_a_gradient(target, wanted):
    x, output, index = make((5,), target.dtype)
    grad = torch.ones_like(x).to(target.device)
    both = run(target, x, output, index, 3.0, grad)[1:]
    inputs = [t.to(target.device) for t in (x, output)]
    inputs[wanted].requires_grad_()
    x0 = posterior_mean(
        *inputs, POSTERIOR.to(target.device), index.to(target.device), guidance_scale=3.0, impl=target.impl
    )
    assert torch.equal(torch.autograd.grad(x0, inputs[wanted], grad)[0].cpu(), both[wanted])


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_row_without_b_never_reads_the_network_output(target, g):
    """Row 0 is the identity: what the network said there reaches neither result nor gradient."""
    x, output, index = make((3, 5), target.dtype, guided=g != 1)
    output[0] = torch.nan
    if g != 1:
        output[4] = torch.inf
    x0, grad_x, grad_output = run(target, x, output, index, g, torch.ones_like(x))
    assert torch.equal(x0[0], x[0])
    assert torch.equal(grad_x[0], torch.ones_like(x[0]))
    assert torch.isfinite(x0).all()
    assert torch.isfinite(grad_output).all()
    assert torch.equal(grad_output[0], torch.zeros_like(x[0]))


def test_out_dtype(target, dtype):
    """Of the result alone: inputs and arithmetic stay as they are."""
    x, output, index = make((4, 8, 8), torch.float32)
    output = output.bfloat16()
    keywords = {"guidance_scale": 5.0, "impl": target.impl}
    inputs = [t.to(target.device) for t in (x, output, POSTERIOR, index)]
    x0 = posterior_mean(*inputs, out_dtype=dtype, **keywords)
    expected = posterior_mean(*inputs, **keywords)
    assert expected.dtype == torch.float32
    assert x0.dtype == dtype
    assert_within_budget(x0, expected, dtype)


def test_a_float64_result_is_the_reference_s():
    x, output, index = make((4,), torch.float32)
    assert (
        posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0, out_dtype=torch.float64).dtype == torch.float64
    )
    with pytest.raises(UserError, match="float64"):
        posterior_mean(x, output, POSTERIOR, index, guidance_scale=5.0, out_dtype=torch.float64, impl="native")


def test_mixed_dtypes(target):
    """Latents in float32, a network in bfloat16: each gradient comes back in the dtype of its input."""
    x, output, index = make((4, 9), torch.float32)
    output, grad = output.bfloat16(), torch.ones_like(x, dtype=torch.float16)
    found = run(target, x, output, index, 5.0, grad, out_dtype=torch.float16)
    assert [t.dtype for t in found] == [torch.float16, torch.float32, torch.bfloat16]
    truth = differentiate(lambda x, output: define(x, output, index, 5.0), x.double(), output.double(), grad.double())
    for value, expected in zip(found, truth, strict=True):
        assert_within_budget(value, expected, value.dtype)


def strided(t):
    """The same values behind other strides."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize(
    "layout", [lambda t: t.to(memory_format=torch.channels_last), strided], ids=["channels_last", "strided"]
)
def test_memory_layout(target, layout):
    x, output, index = make((4, 6, 5), target.dtype)
    grad = torch.linspace(-1, 2, x.numel(), dtype=target.dtype).view_as(x)
    expected = run(target, x, output, index, 5.0, grad)
    found = run(target, layout(x), layout(output), index, 5.0, layout(grad))
    for value, plain in zip(found, expected, strict=True):
        assert torch.equal(value, plain)


def test_row_does_not_depend_on_its_neighbors(target):
    x, output, index = (t.to(target.device) for t in make((16384 + 3,), torch.float32))
    table = POSTERIOR.to(target.device)
    x0 = posterior_mean(x, output, table, index, guidance_scale=5.0, impl=target.impl)
    rows = torch.tensor([2, 1], device=target.device)
    halves = torch.cat([rows, rows + 4])
    part = posterior_mean(x[rows], output[halves], table, index[rows], guidance_scale=5.0, impl=target.impl)
    assert torch.equal(part, x0[rows])


def test_two_columns_of_a_transition_table(target):
    x, output, index = (t.to(target.device) for t in make((4, 5), target.dtype, guided=False))
    table = torch.cat([POSTERIOR, torch.full((4, 1), torch.nan, dtype=torch.float64)], dim=1).to(target.device)
    for t in (table, table.float()):
        part = posterior_mean(x, output, t[:, :2], index, impl=target.impl)
        assert torch.equal(part, posterior_mean(x, output, t[:, :2].contiguous(), index, impl=target.impl))
        assert torch.isfinite(part).all()


def test_an_index_counts_from_the_end_or_is_refused(target):
    """As everywhere in PyTorch; a CUDA kernel cannot raise, so what it computes there is NaN."""
    x, output, index = make((5,), target.dtype)
    grad = torch.ones_like(x)
    for value, expected in zip(
        run(target, x, output, index - len(POSTERIOR), 5.0, grad), run(target, x, output, index, 5.0, grad), strict=True
    ):
        assert torch.equal(value, expected)
    index[1] = len(POSTERIOR)
    if target.impl == "triton":
        assert all(t[1].isnan().all() for t in run(target, x, output, index, 5.0, grad))
    elif target.device == "cpu":
        with pytest.raises(IndexError):
            run(target, x, output, index, 5.0, grad)


def test_the_table_gets_no_gradient(target):
    x, output, index = (t.to(target.device) for t in make((5,), target.dtype, guided=False))
    table = POSTERIOR.to(target.device).requires_grad_()
    assert not posterior_mean(x, output, table, index, impl=target.impl).requires_grad


@slow_when_interpreted
def test_compiles_without_a_graph_break(target):
    x, output, index = (t.to(target.device) for t in make((4, 6, 5), torch.float32))
    table = POSTERIOR.to(target.device)
    output.requires_grad_()

    def loss(x, output):
        return posterior_mean(2 * x, output, table, index, guidance_scale=5.0, impl=target.impl).square().sum()

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


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_the_vjp_is_the_backward(target, dtype, g):
    x, output, index = make((4, 9), dtype, guided=g != 1)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    _, *truth = differentiate(lambda x, output: define(x, output, index, g), x.double(), output.double(), grad.double())
    on_target = (t.to(target.device) for t in (grad.requires_grad_(), POSTERIOR, index))
    found = posterior_mean_vjp(*on_target, guidance_scale=g, impl=target.impl)
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert not value.requires_grad
        assert torch.allclose(value.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_x0": torch.zeros(3)}, "posterior_mean_vjp: grad_x0 has shape"),
        ({"grad_x0": torch.zeros(3, 4, dtype=torch.int32)}, "posterior_mean_vjp: grad_x0 is torch.int32"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "posterior_mean_vjp: index is"),
        ({"impl": "cuda"}, "impl='cuda'"),
    ],
)
def test_bad_input_of_the_vjp_is_one_clear_line(change, message):
    arguments = {"grad_x0": torch.zeros(3, 4), "posterior": POSTERIOR, "index": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(UserError, match=message):
        posterior_mean_vjp(**{**arguments, **change})
