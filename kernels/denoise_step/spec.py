"""What denoise_step declares for the tests, the compile gate and the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.kernels import spec
from sqdf_fast.kernels.denoise_step import denoise_step
from sqdf_fast.kernels.denoise_step.reference import Backward, Forward
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.kernels.spec import GUIDANCE_SCALE, LATENTS, Benchmark, Inputs, Normal, Outputs, Problem, Spec


def operator_calls(device: str) -> spec.Calls:
    step, backward = torch.ops.sqdf_fast.denoise_step, torch.ops.sqdf_fast.denoise_step_backward
    x, policy, reference, table, index, noise, seed = spec.example(device)
    # sampling keeps no gradients, and no delta
    sampling = x, policy, reference, table, index, 5.0, None, seed, 1.0, False
    x, policy, alone = (tensor.clone().requires_grad_() for tensor in (x, policy, policy[:2]))
    inputs, rest = (x, policy, reference, table, index, 5.0), (0.7, True)
    grads = torch.randn_like(noise), torch.randn(2, device=device), torch.randn_like(reference[:2])
    settings = table, index, 5.0, 0.7
    return {
        "denoise_step, noise": (step, (*inputs, noise, None, *rest)),
        "denoise_step, seed": (step, (*inputs, None, seed, *rest)),
        "denoise_step, one output a sample": (
            step,
            (x, alone, reference[:2], table, index, 1.0, noise, None, 1.0, True),
        ),
        "denoise_step, sampling": (step, sampling),
        "denoise_step_backward": (backward, (*grads, *settings, torch.float32, torch.bfloat16)),
        "denoise_step_backward, x alone": (backward, (*grads, *settings, torch.float32, None)),
        "denoise_step_backward, policy alone": (backward, (*grads, *settings, None, torch.bfloat16)),
    }


def launches(quick: bool) -> Iterator[Callable[[], object]]:
    from sqdf_fast.kernels.denoise_step import triton

    for dtype, output, length, g, few in spec.latents(quick):
        rows = 2 if g == 1 else 4
        table, index, seed = spec.empty(50, 3), spec.empty(2, dtype=torch.int64), spec.empty(2, dtype=torch.int64)
        x, noise = (spec.empty(2, length, dtype=dtype) for _ in range(2))
        policy, reference = (spec.empty(rows, length, dtype=output) for _ in range(2))
        delta = spec.empty(2, length, dtype=output)
        inputs = x, policy, reference, table, index, g
        for drawn, with_delta in [(g != 1, True)] if few else itertools.product((True, False), repeat=2):
            given, key = (None, seed) if drawn else (noise, None)
            yield partial(triton.forward, Forward(*inputs, given, key, 1.0, with_delta))
        for dtypes in spec.wanted(dtype, output, few):
            yield partial(triton.backward, Backward(x, spec.empty(2), delta, table, index, g, 1.0, *dtypes))


def inputs(problem: Problem, normal: Normal) -> Inputs:
    batch, *sample = problem.shape
    reference = spec.network_output(batch, tuple(sample), normal)
    policy = reference + 0.02 * normal(2 * batch, *sample)
    given = {
        "x": normal(*problem.shape).requires_grad_(),
        "policy": policy.requires_grad_(),
        "reference": reference,
        "transition": spec.table(3, problem.device),
        "index": spec.index(batch, problem.device),
    }
    if problem.noise == "given":
        given["noise"] = noise = normal(*problem.shape)
    else:
        given["seed"] = spec.seeds(batch, problem.device)
        noise = philox_normal(given["seed"], sample, impl="reference")
    kl_cotangent = torch.linspace(0.5, 1.5, batch, device=problem.device)
    return Inputs(given, ("x", "policy"), (normal(*problem.shape), kl_cotangent), noise)


def ours(problem: Problem, given: spec.Given, impl: str) -> Outputs:
    return denoise_step(**given, guidance_scale=GUIDANCE_SCALE, impl=impl)


def in_pytorch(
    x: Tensor, policy: Tensor, reference: Tensor, transition: Tensor, index: Tensor, g: float, noise: Tensor
) -> Outputs:
    """x, noise [B, ...], policy, reference [2B, ...] -> x_prev [B, ...], kl [B]; half precision computed in float32."""
    p, q, sigma = spec.columns(transition, index, x)
    m, m_ref = spec.guided(policy, g), spec.guided(reference, g)
    x_prev = p * x.float() + q * m + sigma * noise.float()
    kl = ((q / sigma) * (m - m_ref)).square().flatten(1).mean(1)
    return x_prev.to(x.dtype), kl


def in_pytorch_drawing(
    x: Tensor, policy: Tensor, reference: Tensor, transition: Tensor, index: Tensor, g: float
) -> Outputs:
    """`in_pytorch` that draws its noise: our generator, written in PyTorch integers, would be an unfair opponent."""
    return in_pytorch(x, policy, reference, transition, index, g, torch.randn_like(x))


def eager(problem: Problem, given: spec.Given, treat: spec.Treat) -> spec.Forward:
    arguments = *(given[name] for name in ("x", "policy", "reference", "transition", "index")), GUIDANCE_SCALE
    if problem.noise == "drawn" and problem.device == "cuda":
        drawing = treat(in_pytorch_drawing)
        return lambda: drawing(*arguments)
    step = treat(in_pytorch)
    if problem.noise == "given":
        return lambda: step(*arguments, given["noise"])
    # Inductor's generator on the CPU is scalar code, many times slower than torch.randn: draw before the graph.
    return lambda: step(*arguments, torch.randn_like(given["x"]))


def noise_behind(given: spec.Given, outputs: Outputs) -> Tensor:
    """z of x_prev = mean + sigma z."""
    inputs = {name: tensor for name, tensor in given.items() if name != "seed"} | {
        "noise": torch.zeros_like(given["x"])
    }
    with torch.no_grad():
        mean, _ = denoise_step(**inputs, guidance_scale=GUIDANCE_SCALE, impl="reference")
    *_, sigma = spec.columns(given["transition"], given["index"], mean)
    return (outputs[0].double() - mean) / sigma


SPEC = Spec(
    operator_calls,
    launches,
    benchmark=Benchmark(
        sizes=LATENTS,
        inputs=inputs,
        ours=ours,
        eager=eager,
        outputs=("x_prev", "kl"),
        # forward: x, policy (2N), reference (2N), x_prev, delta; backward: d x_prev, delta, d x, d policy (2N).
        # delta = m - m_ref is what the forward leaves to the backward: two passes move it twice.
        tensors_moved={"forward": 7, "backward": 5},
        noise=("given", "drawn"),
        half_precision_on_cuda=True,
        own_precision=frozenset({"transition"}),
        noise_behind=noise_behind,
    ),
)
