"""What discounted_loss declares for the tests, the compile gate and the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.kernels import spec
from sqdf_fast.kernels.discounted_loss import discounted_loss
from sqdf_fast.kernels.discounted_loss.reference import Forward
from sqdf_fast.kernels.spec import Benchmark, Inputs, Normal, Outputs, Problem, Size, Spec

GAMMA, ALPHA = 0.9, 0.01


def operator_calls(device: str) -> spec.Calls:
    reward, kl = (torch.rand(3, device=device, requires_grad=True) for _ in range(2))
    terms = reward, kl, torch.tensor([0, 3, 9], device=device)
    return {"discounted_loss": (torch.ops.sqdf_fast.discounted_loss, (*terms, 0.9, 2.0, True, 4.0))}


def launches(quick: bool) -> Iterator[Callable[[], object]]:
    from sqdf_fast.kernels.discounted_loss import triton

    dtypes = torch.float32, torch.float16, torch.bfloat16
    for dtype, mask in itertools.product(dtypes, (True,) if quick else (True, False)):
        inputs = spec.empty(8, dtype=dtype), spec.empty(8), spec.empty(8, dtype=torch.int64), 0.9, 1.0, mask, 8.0
        yield partial(triton.forward, Forward(*inputs))


def inputs(problem: Problem, normal: Normal) -> Inputs:
    remaining = torch.arange(problem.elements, device=problem.device).reshape(problem.shape) % spec.TABLE_ROWS
    given = {
        "reward": normal(*problem.shape).requires_grad_(),
        "kl": normal(*problem.shape).square().requires_grad_(),
        "remaining": remaining,
    }
    return Inputs(given, ("reward", "kl"), (torch.ones((), device=problem.device),))


def ours(problem: Problem, given: spec.Given, impl: str) -> Outputs:
    return (discounted_loss(**given, gamma=GAMMA, alpha=ALPHA, impl=impl),)


def in_pytorch(reward: Tensor, kl: Tensor, remaining: Tensor, gamma: float, alpha: float) -> Tensor:
    """reward, kl, remaining [B] or [K, B] -> scalar."""
    return (alpha * kl - gamma**remaining * reward).mean()


def eager(problem: Problem, given: spec.Given, treat: spec.Treat) -> spec.Forward:
    loss = treat(in_pytorch)
    return lambda: (loss(given["reward"], given["kl"], given["remaining"], GAMMA, ALPHA),)


SPEC = Spec(
    operator_calls,
    launches,
    benchmark=Benchmark(
        sizes=(Size("batch64", (64,), toy=(64,)), Size("4x64", (4, 64), toy=(4, 64))),
        inputs=inputs,
        ours=ours,
        eager=eager,
        outputs=("loss",),
        # a few numbers: launches are what counts
        tensors_moved={"forward": 0, "backward": 0},
    ),
)
