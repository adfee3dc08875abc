"""The fused implementations as PyTorch operators: schema, fake tensors, autograd, modes, the short lane."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.kernel_targets import OPS, fused_targets, slow_when_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sqdf_fast
from sqdf_fast.kernels import denoise_step, discounted_loss, native, philox_normal, posterior_mean, registry
from sqdf_fast.kernels.spec import example as tensors

TABLE = torch.tensor([[1.02, -0.031, 0.17], [1.4, -0.62, 0.29]])
HALF = torch.bfloat16


def calls(op, device):
    """Every operator of `op` with arguments for it, by name."""
    return registry.spec(op).operator_calls(device)


CASES = [
    pytest.param(target, op, name, id=f"{target}-{name}")
    for target in fused_targets()
    for op in registry.OPS
    if target.runs(op)
    for name in calls(op, "cpu")
]
each_case = pytest.mark.parametrize(("where", "op", "name"), CASES)


def test_memory_is_poisoned():
    """What the tests of this folder rely on: an element that an op forgets to write is not a number."""
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=HALF)).isnan().all()


def test_every_operator_has_cases_and_every_folder_is_in_the_registry():
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    called = {call[0]._qualified_op_name for op in registry.OPS for call in calls(op, "cpu").values()}
    assert called == {name for name in registered if name.startswith("sqdf_fast::")}
    folder = Path(native.__file__).parent
    assert sorted(path.parent.name for path in folder.glob("*/reference.py")) == sorted(registry.OPS)
    assert sorted(path.parent.name for path in folder.glob("*/triton.py")) == sorted(OPS)


@slow_when_interpreted
@each_case
def test_opcheck(where, op, name):
    """Schema, autograd registration, fake tensors and AOT dispatch, as PyTorch checks them."""
    operator, arguments = calls(op, where.device)[name]
    torch.library.opcheck(operator, arguments)


@each_case
def test_fake_outputs_are_the_real_ones_without_values(where, op, name):
    operator, arguments = calls(op, where.device)[name]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for a, b in zip(results(real), results(fake), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
        assert a.is_contiguous()
    pointers = {a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
    assert not pointers & {o.data_ptr() for o in results(real) if o.numel()}


def results(returned):
    """What an operator returned, as a tuple; one that writes its arguments returns None."""
    return () if returned is None else returned if isinstance(returned, tuple) else (returned,)


def loss_of(target, tensors):
    """A loss through all four ops, of the public functions."""
    x, policy, reference, table, index, _, seed = tensors
    impl = target.impl
    x_prev, kl = denoise_step(x, policy, reference, table, index, guidance_scale=5.0, seed=seed, impl=impl)
    x0 = posterior_mean(x_prev, policy, table[:, :2], index, guidance_scale=5.0, impl=impl)
    reward = (x0 * philox_normal(seed, x0.shape[1:], impl=impl)).flatten(1).mean(1)
    return discounted_loss(reward, kl, index, gamma=0.9, alpha=0.5, impl=impl)


def gradients(target, loss):
    x, policy, *rest = tensors(target.device)
    inputs = x.requires_grad_(), policy.requires_grad_()
    value = loss(target, (*inputs, *rest))
    return [t.detach() for t in (value, *torch.autograd.grad(value, inputs))]


class Names(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def test_a_mode_sees_the_operators_and_both_lanes_agree(fused):
    """Plain tensors skip the dispatcher; under a mode every op appears by name. The bits are the same."""
    plain = gradients(fused, loss_of)
    with Names() as seen:
        observed = gradients(fused, loss_of)
    ours = [name.split(".")[1] for name in seen.names if name.startswith("sqdf_fast")]
    forward = [
        "denoise_step",
        "posterior_mean",
        "philox_normal",
        *(["discounted_loss"] if fused.runs("discounted_loss") else []),
    ]
    assert ours == [*forward, "posterior_mean_backward", "denoise_step_backward"]
    for a, b in zip(plain, observed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_loss_is_the_eager_one(fused, backend):
    plain = gradients(fused, loss_of)
    compiled = gradients(fused, torch.compile(loss_of, fullgraph=True, backend=backend))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)


@slow_when_interpreted
def test_compiled_once_for_every_batch_size(fused):
    """dynamic=True: a second batch size compiles nothing new."""
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def step(x, policy, reference, index, noise):
        keywords = {"guidance_scale": 5.0, "noise": noise, "impl": fused.impl}
        return denoise_step(x, policy, reference, TABLE.to(fused.device), index, **keywords)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for batch in (5, 7, 9):  # unlike every other size: equal ones are taken to be the same
        x, policy = torch.randn(batch, 4, 6), torch.randn(2 * batch, 4, 6)
        inputs = [t.to(fused.device) for t in (x, policy, policy + 1, torch.zeros(batch, dtype=torch.int64), x + 1)]
        for a, b in zip(compiled(*inputs), step(*inputs), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays_with_new_inputs():
    """Forward and backward captured once; what is copied into the inputs, seeds included, is what a replay computes."""

    def step(x, policy, reference, table, index, _, seed):
        inputs = x.requires_grad_(), policy.requires_grad_()
        outputs = denoise_step(*inputs, reference, table, index, guidance_scale=5.0, seed=seed, impl="triton")
        cotangents = torch.ones_like(outputs[0]), torch.ones_like(outputs[1])
        return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, inputs, cotangents))]

    placed = tensors("cuda")
    side = torch.cuda.Stream()  # what is compiled, allocated once or loaded lazily must not fall into the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            first = step(*placed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*placed)

    x, policy, reference, table, index, noise, seed = tensors("cuda")
    others = [x + 1, policy - 1, 2 * reference, 0.5 * table, 1 - index, noise, seed - 12345]
    with torch.no_grad():
        for place, other in zip(placed, others, strict=True):
            place.copy_(other)
    graph.replay()
    expected = step(*others)
    for found, fresh, before in zip(captured, expected, first, strict=True):
        assert torch.equal(found, fresh)
        assert not torch.equal(found, before)


def test_fake_tensors_run_a_whole_step(fused):
    """What a simulation of the memory needs: shapes, no values, gradients included."""
    with FakeTensorMode() as mode:
        x, policy, *rest = (mode.from_tensor(t) for t in tensors(fused.device))
        loss_of(fused, (x.requires_grad_(), policy.requires_grad_(), *rest)).backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert (policy.grad.shape, policy.grad.dtype) == (policy.shape, policy.dtype)


def test_a_second_derivative_is_refused_not_wrong(fused):
    x, policy, *rest = tensors(fused.device)
    loss = loss_of(fused, (x.requires_grad_(), policy.requires_grad_(), *rest))
    weight = torch.ones((), device=fused.device, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, policy, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_the_reference_can_be_differentiated_twice():
    x, policy, *rest = (t.double() if t.is_floating_point() else t for t in tensors("cpu"))
    x_prev, _ = denoise_step(x.requires_grad_(), policy.requires_grad_(), *rest[:3], guidance_scale=5.0, noise=rest[3])
    (grad,) = torch.autograd.grad(x_prev.square().sum(), x, create_graph=True)
    grad.sum().backward()
    p = TABLE[torch.tensor([1, 0]), 0].double()
    torch.testing.assert_close(x.grad, (2 * p**2).view(2, 1, 1, 1).expand_as(x))


def test_the_public_names_are_the_ops():
    for name in ("denoise_step", "denoise_step_staged", "discounted_loss", "posterior_mean"):
        assert getattr(sqdf_fast, name) is getattr(sqdf_fast.kernels, name)


def test_function_transforms_are_refused_not_wrong(fused):
    """torch.func.grad wraps tensors whose memory is not theirs; PyTorch's custom ops do not support it."""
    x, policy, *rest = tensors(fused.device)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda policy: loss_of(fused, (x, policy, *rest)))(policy)


def test_a_negated_view_is_read_as_its_values(fused):
    """PyTorch may keep a negation as a flag of a tensor."""
    x, policy, _, table, index, *_ = tensors(fused.device)
    flagged = torch._neg_view(x)
    assert flagged.is_neg()
    keywords = {"guidance_scale": 5.0, "impl": fused.impl}
    found = posterior_mean(flagged, policy, table[:, :2], index, **keywords)
    assert torch.equal(found, posterior_mean(-x, policy, table[:, :2], index, **keywords))
