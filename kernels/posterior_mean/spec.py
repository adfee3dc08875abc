"""What posterior_mean declares for the tests, the compile gate and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.kernels import spec
from sqdf_fast.kernels.posterior_mean import posterior_mean
from sqdf_fast.kernels.posterior_mean.reference import Backward, Forward
from sqdf_fast.kernels.spec import GUIDANCE_SCALE, LATENTS, Benchmark, Inputs, Normal, Outputs, Problem, Spec


def operator_calls(device: str) -> spec.Calls:
    mean, backward = torch.ops.sqdf_fast.posterior_mean, torch.ops.sqdf_fast.posterior_mean_backward
    x, output, _, table, index, *_ = spec.example(device)
    inputs, grad = (x.requires_grad_(), output.requires_grad_()), torch.randn_like(x)
    settings = table[:, :2], index, 5.0
    return {
        "posterior_mean": (mean, (*inputs, *settings, torch.float16)),
        "posterior_mean_backward": (backward, (grad, *settings, torch.float32, torch.bfloat16)),
    }


def launches(quick: bool) -> Iterator[Callable[[], object]]:
    from sqdf_fast.kernels.posterior_mean import triton

    for dtype, output, length, g, few in spec.latents(quick):
        table, index, x = spec.empty(50, 2), spec.empty(2, dtype=torch.int64), spec.empty(2, length, dtype=dtype)
        model_output = spec.empty(2 if g == 1 else 4, length, dtype=output)
        yield partial(triton.forward, Forward(x, model_output, table, index, g, dtype))
        for dtypes in spec.wanted(dtype, output, few):
            yield partial(triton.backward, Backward(x, table, index, g, *dtypes))


def inputs(problem: Problem, normal: Normal) -> Inputs:
    batch, *sample = problem.shape
    given = {
        "x": normal(*problem.shape).requires_grad_(),
        "model_output": spec.network_output(batch, tuple(sample), normal).requires_grad_(),
        "posterior": spec.table(2, problem.device),
        "index": spec.index(batch, problem.device),
    }
    return Inputs(given, ("x", "model_output"), (normal(*problem.shape),))


def ours(problem: Problem, given: spec.Given, impl: str) -> Outputs:
    return (posterior_mean(**given, guidance_scale=GUIDANCE_SCALE, impl=impl),)


def in_pytorch(x: Tensor, model_output: Tensor, posterior: Tensor, index: Tensor, g: float) -> Tensor:
    """x [B, ...], model_output [2B, ...] -> x0 [B, ...]; half precision computed in float32."""
    a, b = spec.columns(posterior, index, x)
    return (a * x.float() + b * spec.guided(model_output, g)).to(x.dtype)


def eager(problem: Problem, given: spec.Given, treat: spec.Treat) -> spec.Forward:
    mean = treat(in_pytorch)
    arguments = [given[name] for name in ("x", "model_output", "posterior", "index")]
    return lambda: (mean(*arguments, GUIDANCE_SCALE),)


SPEC = Spec(
    operator_calls,
    launches,
    benchmark=Benchmark(
        sizes=LATENTS,
        inputs=inputs,
        ours=ours,
        eager=eager,
        outputs=("x0",),
        # forward: x, model_output (2N), x0; backward: d x0, d x, d model_output (2N)
        tensors_moved={"forward": 4, "backward": 4},
        half_precision_on_cuda=True,
        own_precision=frozenset({"posterior"}),
    ),
)
