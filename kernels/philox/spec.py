"""What philox_normal declares for the tests, the compile gate and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from sqdf_fast.kernels import spec
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.kernels.philox.reference import Draw
from sqdf_fast.kernels.spec import LATENTS, Benchmark, Inputs, Normal, Outputs, Problem, Spec


def operator_calls(device: str) -> spec.Calls:
    arguments = torch.tensor([7, -9], device=device), 20
    ops = torch.ops.sqdf_fast
    return {name: (getattr(ops, name), arguments) for name in ("philox_normal", "philox_normal_reference")}


def launches(quick: bool) -> Iterator[Callable[[], object]]:
    from sqdf_fast.kernels.philox import triton

    for length in spec.lengths(quick):
        for function in (triton.normal, triton.words):
            yield partial(function, Draw(spec.empty(2, dtype=torch.int64), length))


def inputs(problem: Problem, normal: Normal) -> Inputs:
    seed = spec.seeds(problem.shape[0], problem.device)
    return Inputs({"seed": seed}, noise=philox_normal(seed, problem.shape[1:], impl="reference"))


def ours(problem: Problem, given: spec.Given, impl: str) -> Outputs:
    return (philox_normal(given["seed"], problem.shape[1:], impl=impl),)


def eager(problem: Problem, given: spec.Given, treat: spec.Treat) -> spec.Forward:
    return lambda: (torch.randn(problem.shape, device=problem.device),)


SPEC = Spec(
    operator_calls,
    launches,
    benchmark=Benchmark(
        sizes=LATENTS,
        inputs=inputs,
        ours=ours,
        eager=eager,
        outputs=("noise",),
        tensors_moved={"forward": 1},
        noise=("drawn",),
        compiled=False,
        noise_behind=lambda given, outputs: outputs[0].double(),
    ),
)
