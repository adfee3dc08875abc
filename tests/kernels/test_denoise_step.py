"""denoise_step against its definition, written out sample by sample in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_targets import (
    assert_within_budget,
    relative_error,
    slow_interpreted,
    slow_when_interpreted,
    without_gradient,
)

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import denoise_step, denoise_step_staged, denoise_step_vjp, philox_normal

TRANSITION = torch.tensor(
    [[1.02, -0.031, 0.17], [1.4, -0.62, 0.29], [0.97, 0.11, 0.043], [1.0, -0.02, 0.0], [14.6, -14.57, 1e-3]],
    dtype=torch.float64,
)
SHAPES = [(1,), (127,), pytest.param((16384 + 3,), marks=slow_interpreted), (7, 5), (4, 9, 11), (3, 2, 5, 7)]


def make(shape, dtype, *, guided=True, difference=1.0, seed=0, index=(2, 0, 1)):
    """x, policy, reference, noise and index on the CPU; the network outputs are `difference` apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows):
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    rows = len(index) * (2 if guided else 1)
    reference = normal(rows)
    policy = reference + difference * normal(rows)
    return [*(t.to(dtype) for t in (normal(len(index)), policy, reference, normal(len(index)))), torch.tensor(index)]


def guide(output, b, batch, g):
    return output[b] if g == 1 else (1 - g) * output[b] + g * output[batch + b]


def define(x, policy, reference, noise, index, g, kl_scale=1.0, table=TRANSITION):
    """x_prev and kl in float64, from the definition."""
    x, policy, reference, noise = (t.double() for t in (x, policy, reference, noise))
    x_prev, kl = [], []
    for b, (p, q, sigma) in enumerate(table[index].tolist()):
        x_prev.append(p * x[b] + q * guide(policy, b, len(x), g) + sigma * noise[b])
        kl.append(kl_scale * (q * guide(policy - reference, b, len(x), g) / sigma).square().mean())
    return torch.stack(x_prev), torch.stack(kl)


def cotangents(x, seed=1):
    """Of x_prev, in its dtype, and of kl."""
    generator = torch.Generator().manual_seed(seed)
    kl_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = torch.randn(len(x), generator=generator, dtype=torch.float64).to(kl_dtype)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), weights


def differentiate(step, x, policy, grads):
    """The step's outputs, and the gradients of x and policy under the cotangents `grads`."""
    x, policy = x.detach().requires_grad_(), policy.detach().requires_grad_()
    outputs = step(x, policy)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, (x, policy), grads))]


def run(target, x, policy, reference, noise, index, g, grads, **keywords):
    """x_prev, kl, d x, d policy of a target, on the CPU."""
    reference, noise, index, table, *grads = (
        t.to(target.device) for t in (reference, noise, index, TRANSITION, *grads)
    )

    def step(x, policy):
        return denoise_step(
            x, policy, reference, table, index, guidance_scale=g, noise=noise, impl=target.impl, **keywords
        )

    return [t.cpu() for t in differentiate(step, x.to(target.device), policy.to(target.device), grads)]


def magnitudes(x, policy, reference, noise, index, g, kl_scale, grads):
    """Sizes [B or 2B, 1] of the terms that each result adds up: their sum may be small, their errors are not."""

    def positive(output):
        """Absolute values that guidance adds up."""
        return output.abs() if g <= 1 else torch.cat([-output.abs()[: len(x)], output.abs()[len(x) :]])

    x, policy, reference, noise = (t.double() for t in (x, policy, reference, noise))
    zeros, table = torch.zeros_like(policy), TRANSITION.abs()

    def definition(x, policy):
        return define(x, policy, zeros, noise.abs(), index, g, kl_scale, table)

    sizes = differentiate(definition, x.abs(), positive(policy - reference), [t.double().abs() for t in grads])
    sizes[0] = definition(x.abs(), positive(policy))[0]
    return [size.reshape(len(size), -1).norm(dim=1, keepdim=True) for size in sizes]


def check(target, dtype, shape, g, kl_scale=0.5, **keywords):
    """Values and gradients of a target against the definition, inside the error budget of `dtype`."""
    x, policy, reference, noise, index = make(shape, dtype, guided=g != 1, **keywords)
    grads = cotangents(x)

    def definition(x, policy):
        return define(x, policy, reference, noise, index, g, kl_scale)

    truth = differentiate(definition, x.double(), policy.double(), [t.double() for t in grads])
    found = run(target, x, policy, reference, noise, index, g, grads, kl_scale=kl_scale)
    plain = None
    if target.impl != "reference":
        plain = run(type(target)("cpu", "reference"), x, policy, reference, noise, index, g, grads, kl_scale=kl_scale)
    terms = magnitudes(x, policy, reference, noise, index, g, kl_scale, grads)
    for i, name in enumerate(("x_prev", "kl", "grad_x", "grad_policy")):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert found[i].dtype == (wide if name == "kl" else dtype)
        # a KL is never rounded to half precision
        reference_result = None if plain is None else plain[i]
        # of one element or a few, everything may cancel: the budget is relative to the terms there
        few = terms[i] if x[0].numel() < 100 else None
        assert_within_budget(found[i], truth[i], found[i].dtype, reference_result, few)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("g", [1.0, 5.0, 0.0])
def test_equals_definition(target, dtype, shape, g):
    check(target, dtype, shape, g)


def test_one_sample(target):
    check(target, target.dtype, (4, 5, 5), 7.5, index=(1,))


def test_small_kl_keeps_its_digits(target):
    """Outputs a thousandth apart, as in a real run: the KL is about 2e-5 and still right to six digits."""
    check(target, torch.float32, (4, 16, 16), 5.0, difference=1e-3)


def test_extreme_coefficients(fused):
    """Near a vanishing signal p x and q m are large and cancel, and 1 / sigma^2 is a million."""
    for dtype in fused.dtypes[:1] + fused.dtypes[-1:]:
        check(fused, dtype, (4, 9, 11), 7.5, index=(4, 1, 4))


@slow_when_interpreted
@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    index=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    g=st.sampled_from([1.0, 3.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(target, shape, index, g, seed):
    check(target, target.dtype, tuple(shape), g, index=tuple(index), seed=seed)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_gradients_of_the_reference(g):
    x, policy, reference, noise, index = make((2, 3), torch.float64, guided=g != 1)

    def step(x, policy):
        return denoise_step(x, policy, reference, TRANSITION, index, guidance_scale=g, noise=noise)

    assert torch.autograd.gradcheck(step, (x.requires_grad_(), policy.requires_grad_()))


def check_gradient_paths(target):
    """d x_prev and d kl alone: p, q (1 - g), q g of the one, 2 q^2 / (sigma^2 N) delta of the other."""
    g, dtype = 5.0, target.dtype
    x, policy, reference, noise, index = make((4, 3), dtype)
    grad_x_prev, grad_kl = cotangents(x)
    p, q, sigma = (c[:, None, None] for c in TRANSITION[index].unbind(1))
    difference = (policy.double() - reference.double()).chunk(2)
    delta = (1 - g) * difference[0] + g * difference[1]
    for x_prev_path in (True, False):
        if x_prev_path:
            grads = grad_x_prev, torch.zeros_like(grad_kl)
            expected_x, expected = p * grad_x_prev, q * grad_x_prev
        else:
            grads = torch.zeros_like(grad_x_prev), grad_kl
            expected_x, expected = torch.zeros_like(delta), grad_kl[:, None, None] * 2 * (q / sigma) ** 2 / 12 * delta
        grad_x, grad_policy = run(target, x, policy, reference, noise, index, g, grads)[2:]
        assert_within_budget(grad_x, expected_x, dtype)
        assert_within_budget(grad_policy, torch.cat([(1 - g) * expected, g * expected]), dtype)


def test_gradient_of_each_path(target):
    check_gradient_paths(target)


def mutated(path):
    """denoise_step with one of its gradient paths cut."""
    whole = denoise_step

    def step(x, policy, *arguments, **keywords):
        rows = torch.arange(len(policy), device=policy.device).view(-1, *(1,) * (policy.ndim - 1))
        unconditional = rows < len(x)
        if path == "d x":
            x = without_gradient(x)
        elif path == "unconditional half":
            policy = torch.where(unconditional, without_gradient(policy), policy)
        elif path == "conditional half":
            policy = torch.where(unconditional, policy, without_gradient(policy))
        x_prev, kl = whole(x, policy, *arguments, **keywords)
        if path == "d x_prev":
            x_prev = whole(x, without_gradient(policy), *arguments, **keywords)[0]
        elif path == "d kl":
            kl = without_gradient(kl)
        return x_prev, kl

    return step


@pytest.mark.parametrize("path", ["d x_prev", "d kl", "unconditional half", "conditional half", "d x"])
def test_a_cut_gradient_path_is_noticed(target, path, monkeypatch):
    """The check that `test_gradient_of_each_path` makes fails when any path is missing."""
    monkeypatch.setitem(run.__globals__, "denoise_step", mutated(path))
    with pytest.raises(AssertionError, match="relative error"):
        check_gradient_paths(target)


def test_an_output_that_is_not_used_has_no_gradient_to_give(target):
    """Only x_prev, or only kl, enters the loss."""
    x, policy, reference, noise, index = (t.to(target.device) for t in make((4, 3), target.dtype))
    table = TRANSITION.to(target.device)
    policy.requires_grad_()
    outputs = denoise_step(x, policy, reference, table, index, guidance_scale=5.0, noise=noise, impl=target.impl)
    alone = []
    for used, unused in (outputs, outputs[::-1]):
        alone += torch.autograd.grad(used.sum(), policy, retain_graph=True)
        grads = torch.ones_like(used), torch.zeros_like(unused)
        assert torch.equal(alone[-1], torch.autograd.grad((used, unused), policy, grads, retain_graph=True)[0])
    assert not torch.equal(*alone)


@pytest.mark.parametrize("wanted", ["x", "policy"])
def test_only_one_input_needs_a_gradient(target, wanted):
    x, policy, reference, noise, index = (t.to(target.device) for t in make((4, 3), target.dtype))
    table, grads = TRANSITION.to(target.device), [t.to(target.device) for t in cotangents(x)]

    def step(x, policy):
        return denoise_step(x, policy, reference, table, index, guidance_scale=5.0, noise=noise, impl=target.impl)

    both = differentiate(step, x, policy, grads)[2 if wanted == "x" else 3]
    leaf = (x if wanted == "x" else policy).requires_grad_()
    outputs = step(x, policy)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    (alone,) = torch.autograd.grad([u[0] for u in used], leaf, [u[1] for u in used])
    assert torch.equal(alone, both)


@pytest.mark.parametrize("g", [1.0, 5.0])
def test_staged_backward_equals_autograd(target, dtype, g):
    x, policy, reference, noise, index = make((3, 5, 5), dtype, guided=g != 1)
    grads = cotangents(x)
    expected = run(target, x, policy, reference, noise, index, g, grads, kl_scale=0.7)[3]
    x, policy, reference, noise, index, table, *grads = (
        t.to(target.device) for t in (x, policy.requires_grad_(), reference, noise, index, TRANSITION, *grads)
    )
    keywords = {"guidance_scale": g, "kl_scale": 0.7, "impl": target.impl}
    delta = denoise_step_staged(x, policy, reference, table, index, noise=noise, **keywords)[2]
    assert not delta.requires_grad
    assert delta.dtype == dtype
    grad = denoise_step_vjp(grads[0].requires_grad_(), grads[1], delta, table, index, **keywords)
    assert not grad.requires_grad
    # float32 at least: a cast to half precision belongs to the caller, after scaling
    assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_budget(grad, expected, dtype)


def test_staged_equals_plain(target):
    x, policy, reference, noise, index = (t.to(target.device) for t in make((3, 5, 5), target.dtype))
    keywords = {"guidance_scale": 5.0, "noise": noise, "impl": target.impl}
    table = TRANSITION.to(target.device)
    plain = denoise_step(x, policy, reference, table, index, **keywords)
    *staged, delta = denoise_step_staged(x, policy, reference, table, index, **keywords)
    assert torch.equal(plain[0], staged[0])
    assert torch.equal(plain[1], staged[1])
    difference = (policy.double() - reference.double()).chunk(2)
    assert_within_budget(delta, -4 * difference[0] + 5 * difference[1], target.dtype)


def test_equal_policy_and_reference(target, dtype):
    """KL exactly 0 with an exactly zero gradient, in every dtype and where sigma is 0."""
    x, policy, _, noise, index = make((4, 33), dtype, index=(0, 3, 2))
    grads = torch.zeros_like(x), torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _, kl, _, grad_policy = run(target, x, policy, policy, noise, index, 5.0, grads)
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(grad_policy, torch.zeros_like(policy))


def test_deterministic_rows(target):
    """sigma = 0: different outputs are infinitely far, equal ones not at all; q = 0: m does not matter."""
    table = torch.tensor([[0.9, -0.3, 0.0], [0.9, 0.0, 0.0], [0.9, 0.0, 0.5]], dtype=torch.float64)
    x, policy, reference, noise, _ = make((5,), target.dtype, guided=False)
    x, policy, reference, noise, table = (t.to(target.device) for t in (x, policy, reference, noise, table))
    index = torch.arange(3, device=target.device)
    x_prev, kl = denoise_step(x, policy, reference, table, index, noise=noise, impl=target.impl)
    assert kl.tolist() == [float("inf"), 0.0, 0.0]
    torch.testing.assert_close(x_prev[0], 0.9 * x[0] - 0.3 * policy[0])
    torch.testing.assert_close(x_prev[1], 0.9 * x[1])
    zeros = torch.zeros_like(x)
    grad = denoise_step_vjp(zeros, torch.ones_like(x[:, 0]), zeros, table, index, impl=target.impl)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_deterministic_row_trains_as_long_as_its_kl_is_not_in_the_loss(target):
    """0 * inf once more: the cotangent of the KL is 0 there."""
    x, policy, reference, noise, index = (t.to(target.device) for t in make((5,), target.dtype, index=(3, 0)))
    table = TRANSITION.to(target.device)
    keywords = {"guidance_scale": 5.0, "impl": target.impl}
    x_prev, _ = denoise_step(x, policy.requires_grad_(), reference, table, index, noise=noise, **keywords)
    (grad,) = torch.autograd.grad(x_prev.sum(), policy)
    q = TRANSITION[index.cpu(), 1].view(2, 1)
    assert_within_budget(grad, torch.cat([-4 * q, 5 * q]).expand(4, 5), target.dtype)
    weights = torch.zeros_like(x[:, 0])
    assert torch.equal(denoise_step_vjp(torch.ones_like(x), weights, x, table, index, **keywords), grad)


def test_an_index_counts_from_the_end_or_is_refused(target):
    """As everywhere in PyTorch; a CUDA kernel cannot raise, so what it computes there is NaN."""
    x, policy, reference, noise, index = (t.to(target.device) for t in make((5,), target.dtype))
    table, grads = TRANSITION.to(target.device), [t.to(target.device) for t in cotangents(x)]

    def step(index):
        def of(x, policy):
            keywords = {"guidance_scale": 5.0, "noise": noise, "impl": target.impl}
            return denoise_step(x, policy, reference, table, index, **keywords)

        return differentiate(of, x, policy, grads)

    for value, expected in zip(step(index - len(table)), step(index), strict=True):
        assert torch.equal(value, expected)
    for outside in (len(table), -len(table) - 1):
        index[1] = outside
        if target.device == "cpu" and target.impl != "triton":
            with pytest.raises(IndexError):
                step(index)
        elif target.impl == "triton":
            assert all(t[1].isnan().all() and t[0].isfinite().all() for t in step(index))


def test_reference_gets_no_gradient(target):
    x, policy, reference, noise, index = (t.to(target.device) for t in make((4,), target.dtype))
    table = TRANSITION.to(target.device)
    reference.requires_grad_()
    keywords = {"guidance_scale": 2.0, "noise": noise, "impl": target.impl}
    outputs = denoise_step(x, policy, reference, table, index, **keywords)
    assert not any(output.requires_grad for output in outputs)
    policy.requires_grad_()
    noise.requires_grad_()
    table.requires_grad_()
    x_prev, kl = denoise_step(x, policy, reference, table, index, **keywords)
    (x_prev.sum() + kl.sum()).backward()
    assert reference.grad is noise.grad is table.grad is None
    assert policy.grad is not None


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(target, dtypes):
    """Each tensor in its own dtype: arithmetic in float32 on the values as they are, results in their own dtypes."""
    *tensors, index = make((4, 8, 9), torch.float32)
    x, policy, reference, noise = (t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    grads = cotangents(x)

    def definition(x, policy):
        return define(x, policy, reference, noise, index, 5.0)

    truth = differentiate(definition, x.double(), policy.double(), [t.double() for t in grads])
    found = run(target, x, policy, reference, noise, index, 5.0, grads)
    for value, expected, dtype in zip(found, truth, (dtypes[0], torch.float32, dtypes[0], dtypes[1]), strict=True):
        assert value.dtype == dtype
        assert_within_budget(value, expected, dtype)


def test_table_in_float32_or_float64(target):
    x, policy, reference, noise, index = (t.to(target.device) for t in make((4, 8, 8), torch.float32))
    keywords = {"guidance_scale": 5.0, "noise": noise, "impl": target.impl}
    table = TRANSITION.to(target.device)
    double = denoise_step(x, policy, reference, table, index, **keywords)
    single = denoise_step(x, policy, reference, table.float(), index, **keywords)
    assert torch.equal(double[0], single[0])
    assert torch.equal(double[1], single[1])


def strided(t):
    """The same values behind other strides."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def channels_last(t):
    return t.to(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 6, 5), channels_last),
        ((4, 3, 6, 5), channels_last),
        ((4, 6, 5), lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)),
        ((33, 6), strided),
        ((4, 3, 6, 5), strided),
        ((4, 6, 5), lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]]),
        ((35,), lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)),
    ],
    ids=["channels_last", "channels_last_3d", "transposed", "strided", "strided_5d", "sliced", "misaligned"],
)
def test_memory_layout(target, shape, layout):
    """The layout changes no value: not the noise, not the KL, not a gradient. The incoming gradient has one too."""
    x, policy, reference, _, index = (t.to(target.device) for t in make(shape, target.dtype))
    table, seed = TRANSITION.to(target.device), torch.tensor([5, -6, 7], device=target.device)
    grads = [t.to(target.device) for t in cotangents(x)]

    def step(x, policy, reference):
        return denoise_step(x, policy, reference, table, index, guidance_scale=5.0, seed=seed, impl=target.impl)

    expected = differentiate(lambda x, policy: step(x, policy, reference), x, policy, grads)
    grads[0] = layout(grads[0])
    moved = layout(reference)
    found = differentiate(lambda x, policy: step(x, policy, moved), layout(x), layout(policy), grads)
    for value, plain in zip(found, expected, strict=True):
        assert_within_budget(value, plain, target.dtype)


def test_seed_draws_the_counter_based_noise(target, dtype):
    """As if the noise of `philox_normal` had been given, at every element, beyond the first block too."""
    x, policy, reference, _, index = (t.to(target.device) for t in make((3, 1367), dtype))
    seed = torch.tensor([11, -3, 2**62], device=target.device)
    table = TRANSITION.to(target.device)
    keywords = {"guidance_scale": 5.0, "impl": target.impl}
    drawn = denoise_step(x, policy, reference, table, index, seed=seed, **keywords)
    noise = philox_normal(seed, (3, 1367), impl="reference")
    given = denoise_step(x, policy, reference, table, index, noise=noise, **keywords)
    assert torch.equal(drawn[1], given[1])
    assert (drawn[0].double() - given[0].double()).abs().max() <= 1e-6 + torch.finfo(dtype).eps * given[0].abs().max()


@pytest.mark.parametrize(
    "elements", [127, 2048 + 3, *(pytest.param(n, marks=slow_interpreted) for n in (16384 + 3, 36001))]
)
def test_row_does_not_depend_on_its_neighbors(target, elements):
    x, policy, reference, _, index = (t.to(target.device) for t in make((elements,), torch.float32, index=(2, 0, 1, 1)))
    seed, table = torch.arange(4, device=target.device), TRANSITION.to(target.device)
    grads = [t.to(target.device) for t in cotangents(x)]

    def step(rows, halves):
        def of(x, policy):
            return denoise_step(
                x, policy, reference[halves], table, index[rows], guidance_scale=5.0, seed=seed[rows], impl=target.impl
            )

        return differentiate(of, x[rows], policy[halves], [grad[rows] for grad in grads])

    whole = step(torch.arange(4), torch.arange(8))
    for rows in (torch.tensor([3]), torch.tensor([2, 1])):
        halves = torch.cat([rows, rows + 4])
        for value, expected, of in zip(step(rows, halves), whole, (rows, rows, rows, halves), strict=True):
            assert torch.equal(value, expected[of.to(expected.device)])


@slow_when_interpreted
def test_compiles_without_a_graph_break(target):
    x, policy, reference, noise, index = (t.to(target.device) for t in make((4, 6, 5), torch.float32))
    table = TRANSITION.to(target.device)
    policy.requires_grad_()

    def loss(x, policy, reference, noise):
        keywords = {"guidance_scale": 5.0, "noise": noise, "impl": target.impl}
        x_prev, kl = denoise_step(2 * x, policy, reference, table, index, **keywords)
        return x_prev.square().sum() + kl.sum()

    expected = loss(x, policy, reference, noise)
    (expected_grad,) = torch.autograd.grad(expected, policy)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, policy, reference, noise)
    (grad,) = torch.autograd.grad(compiled, policy)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_half_precision_keeps_what_float32_would_lose(target):
    """fp16 outputs differ by less than their guided sum could show: the difference is taken before guidance."""
    x, _, reference, noise, index = make((64,), torch.float16)
    policy = reference.clone()
    policy[:, ::2] = torch.nextafter(reference[:, ::2].float(), torch.tensor(float("inf"))).half()
    policy[:, 1] = (reference[:, 1].float() * (1 + 2**-10)).half()
    _, kl, *_ = run(target, x, policy, reference, noise, index, 7.5, cotangents(x))
    _, expected = define(x, policy, reference, noise, index, 7.5)
    assert (relative_error(kl, expected) <= 1e-6).all()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(3)}, "denoise_step_vjp: delta has shape"),
        ({"delta": torch.zeros(3, 4, dtype=torch.int32)}, "denoise_step_vjp: delta is torch.int32"),
        ({"grad_x_prev": torch.zeros(3, 5)}, "denoise_step_vjp: grad_x_prev has shape"),
        ({"grad_kl": torch.zeros(2)}, "grad_kl \\(2,\\)"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "index is"),
    ],
)
def test_bad_input_of_the_staged_backward(change, message):
    arguments = {
        "grad_x_prev": torch.zeros(3, 4),
        "grad_kl": torch.zeros(3),
        "delta": torch.zeros(3, 4),
        "transition": TRANSITION,
        "index": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(UserError, match=message) as caught:
        denoise_step_vjp(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_more_elements_than_a_seed_can_draw():
    huge = torch.zeros(1).expand(2, 2**34 + 1)
    with pytest.raises(UserError, match="more than a seed can draw"):
        denoise_step(huge, huge, huge, TRANSITION, torch.zeros(2, dtype=torch.int64), seed=torch.zeros(2).long())
