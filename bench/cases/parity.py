"""Parity before time: an op's inputs, and what an implementation computes with them, against float64.

A sample's relative L2 error may be at most twice that of the reference implementation in the same dtype, plus
1e-6 (float32), 1e-3 (float16) or 8e-3 (bfloat16). Values and gradients alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.kernels import registry
from sqdf_fast.kernels.spec import Benchmark as Declaration
from sqdf_fast.kernels.spec import Forward, Inputs, Outputs, Problem

Truth = dict[str, tuple[Tensor, Tensor]]
"""By name of a result: its value in float64, and the error of every row that the reference makes."""

BASELINES = ("eager", "compile")
ALLOWANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Setup:
    """A problem with its inputs."""

    problem: Problem
    inputs: Inputs

    @property
    def declared(self) -> Declaration:
        return declaration(self.problem.op)

    def forward(self, implementation: str) -> Forward:
        """The forward of an implementation on these inputs; "compile" is compiled for these shapes alone."""
        given = self.inputs.given
        if implementation not in BASELINES:
            return lambda: self.declared.ours(self.problem, given, implementation)
        if implementation == "eager":
            return self.declared.eager(self.problem, given, lambda function: function)
        torch.compiler.reset()  # a recompilation limit is no part of what is measured
        return self.declared.eager(self.problem, given, partial(torch.compile, fullgraph=True, dynamic=False))

    def backward(self, outputs: Outputs) -> Outputs:
        """Gradients of the leaves, from the graph of `outputs`."""
        leaves = [self.inputs.given[name] for name in self.inputs.leaves]
        return torch.autograd.grad(outputs, leaves, self.inputs.cotangents)

    def in_dtype(self, dtype: torch.dtype) -> Setup:
        """The setup in another precision, with the noise that a seed stands for put in.

        Tables keep their own precision: an op's coefficients are not rounded to the precision of its latents.
        """
        kept = self.declared.own_precision if dtype != torch.float64 else ()
        given: dict[str, Tensor] = {}
        for name, tensor in self.inputs.given.items():
            leaf = tensor.detach()
            leaf = leaf.to(dtype) if leaf.is_floating_point() and name not in kept else leaf
            given[name] = leaf.requires_grad_(name in self.inputs.leaves)
        if given.pop("seed", None) is not None and self.inputs.noise is not None:
            given["noise"] = self.inputs.noise.to(torch.float64 if dtype == torch.float64 else torch.float32)
        cotangents = tuple(c.double() if dtype == torch.float64 else c for c in self.inputs.cotangents)
        return Setup(self.problem, replace(self.inputs, given=given, cotangents=cotangents))


def declaration(op: str) -> Declaration:
    """What an op of `registry.benchmarked()` declares in its folder."""
    found: Declaration = registry.spec(op).benchmark
    return found


def make(problem: Problem) -> Setup:
    """Random inputs on the problem's device, the same for the same problem."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device, problem.dtype)

    return Setup(problem, declaration(problem.op).inputs(problem, normal))


def truth(setup: Setup) -> Truth:
    """What the reference implementation computes in float64, and its errors in the setup's own dtype."""
    if not setup.inputs.leaves:
        (name,), noise = setup.declared.outputs, setup.inputs.noise.double()
        return {name: (noise, torch.zeros(len(noise), dtype=torch.float64))}
    exact, own = (
        results(wanted, wanted.forward("reference"))
        for wanted in (setup.in_dtype(torch.float64), setup.in_dtype(setup.problem.dtype))
    )
    return {name: (exact[name], relative_error(own[name], exact[name])) for name in exact}


def results(setup: Setup, forward: Forward) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs = forward()
    named = dict(zip(setup.declared.outputs, outputs, strict=True))
    if setup.inputs.leaves:
        gradients = setup.backward(outputs)
        named |= {f"d {name}": gradient for name, gradient in zip(setup.inputs.leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in named.items()}


def fault(setup: Setup, expected: Truth, forward: Forward, own_noise: bool = False) -> str | None:
    """Why the implementation's results are wrong, or None. `own_noise`: it draws noise of its own choosing."""
    found = results(setup, forward)
    if own_noise:
        outputs = tuple(found[name] for name in setup.declared.outputs)
        noise = setup.declared.noise_behind(setup.in_dtype(torch.float64).inputs.given, outputs)
        if wrong := _no_standard_normal(noise):
            return wrong
        del found[setup.declared.outputs[0]]
    allowance = ALLOWANCE[setup.problem.dtype]
    for name, result in found.items():
        exact, own_error = expected[name]
        if result.shape != exact.shape:
            return f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}"
        error, budget = relative_error(result, exact), 2 * own_error + allowance
        if not bool((error <= budget).all()):  # NaN is outside every budget
            worst = int((error - budget).nan_to_num(nan=math.inf).argmax())
            return f"{name}: relative error {error[worst]:.2e} of row {worst}, budget {budget[worst]:.2e}"
    return None


def relative_error(result: Tensor, exact: Tensor) -> Tensor:
    """L2 error of every row over the row's norm, [rows] on the CPU; a scalar counts as one row."""
    exact = exact.double()
    difference = (result.double() - exact).reshape(max(len(exact), 1) if exact.ndim else 1, -1).norm(dim=1)
    norm = exact.reshape(len(difference), -1).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / norm).cpu()


def _no_standard_normal(noise: Tensor) -> str | None:
    """The first two moments of white noise within six standard errors, neighbors and samples unlike each other."""
    count = noise.numel()
    bound = 6 / math.sqrt(count)
    moments = {
        "mean": (noise.mean(), 0.0, bound),
        "variance": (noise.square().mean(), 1.0, bound * math.sqrt(2)),
        "correlation of neighbors": ((noise.flatten()[1:] * noise.flatten()[:-1]).mean(), 0.0, bound),
    }
    if len(noise) > 1:
        product = (noise[1:] * noise[:-1]).mean()
        moments["correlation of samples"] = (product, 0.0, 6 / math.sqrt(noise[1:].numel()))
    for name, (value, expected, tolerance) in moments.items():
        if not abs(float(value) - expected) <= tolerance + 1e-3:  # bfloat16 latents round the noise
            return f"the noise drawn is not standard normal: {name} {float(value):.4f}"
    return None
