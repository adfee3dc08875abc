"""Parity before time: what an implementation computes, against float64, inside the error budget.

A sample's relative L2 error may be at most twice that of the reference implementation in the same dtype, plus
1e-6 (float32), 1e-3 (float16) or 8e-3 (bfloat16). Values and gradients alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops import setups
from fused_ops.cases import GUIDANCE_SCALE
from fused_ops.setups import Forward, Setup
from sqdf_fast.kernels import denoise_step

ALLOWANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Truth:
    """Results by name in float64, and the errors that the reference makes in the setup's own dtype."""

    results: dict[str, Tensor]
    errors: dict[str, Tensor]


def truth(setup: Setup) -> Truth:
    """What the reference implementation computes in float64 and in the setup's dtype."""
    if setup.problem.op == "philox":
        noise = setup.noise.double()
        return Truth({"noise": noise}, {"noise": torch.zeros(len(noise), dtype=torch.float64)})
    exact = results(_reference(setup, torch.float64))
    own = results(_reference(setup, setup.problem.dtype))
    return Truth(exact, {name: relative_error(own[name], exact[name]) for name in exact})


def results(setup: Setup, forward: Forward | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; of the reference implementation unless told otherwise."""
    outputs = (forward or setups.forward(setup, "reference"))()
    if setup.problem.op == "philox":
        return {"noise": outputs[0]}
    names = ("x_prev", "kl") if setup.problem.op == "denoise_step" else ("result",)
    gradients = setup.backward(outputs)
    named = dict(zip(names, outputs, strict=True))
    named |= {f"d {name}": gradient for name, gradient in zip(setup.leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in named.items()}


def fault(setup: Setup, expected: Truth, forward: Forward, own_noise: bool = False) -> str | None:
    """Why the implementation's results are wrong, or None. `own_noise`: it draws noise of its own choosing."""
    found = results(setup, forward)
    if own_noise:
        name = "noise" if setup.problem.op == "philox" else "x_prev"
        problem = _no_standard_normal(_noise_behind(setup, found.pop(name)))
        if problem:
            return problem
    allowance = ALLOWANCE[setup.problem.dtype]
    for name, result in found.items():
        exact = expected.results[name]
        if result.shape != exact.shape:
            return f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}"
        error, budget = relative_error(result, exact), 2 * expected.errors[name] + allowance
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


def _reference(setup: Setup, dtype: torch.dtype) -> Setup:
    """The setup in another precision, with the noise that a seed stands for put in."""
    inputs = {}
    for name, tensor in setup.inputs.items():
        leaf = tensor.detach()
        # Tables keep their own precision: an op's coefficients are not rounded to the precision of its latents.
        if leaf.is_floating_point() and (name not in ("transition", "posterior") or dtype == torch.float64):
            leaf = leaf.to(dtype)
        inputs[name] = leaf.requires_grad_(name in setup.leaves)
    if inputs.pop("seed", None) is not None:
        inputs["noise"] = setup.noise.to(torch.float64 if dtype == torch.float64 else torch.float32)
    cotangents = tuple(c.double() if dtype == torch.float64 else c for c in setup.cotangents)
    return Setup(setup.problem, inputs, setup.leaves, cotangents, setup.noise)


def _noise_behind(setup: Setup, result: Tensor) -> Tensor:
    """z of x_prev = mean + sigma z, in float64; the result itself where it is the noise."""
    if setup.problem.op == "philox":
        return result.double()
    exact = _reference(setup, torch.float64).inputs
    exact["noise"] = torch.zeros_like(exact["noise"])
    with torch.no_grad():
        mean, _ = denoise_step(**exact, guidance_scale=GUIDANCE_SCALE, impl="reference")
    sigma = exact["transition"][exact["index"], 2].reshape(-1, *(1,) * (result.ndim - 1))
    return (result.double() - mean) / sigma


def _no_standard_normal(noise: Tensor) -> str | None:
    """The first two moments of white noise within six standard errors, neighbours and samples unlike each other."""
    count = noise.numel()
    bound = 6 / math.sqrt(count)
    moments = {
        "mean": (noise.mean(), 0.0, bound),
        "variance": (noise.square().mean(), 1.0, bound * math.sqrt(2)),
        "correlation of neighbours": ((noise.flatten()[1:] * noise.flatten()[:-1]).mean(), 0.0, bound),
    }
    if len(noise) > 1:
        product = (noise[1:] * noise[:-1]).mean()
        moments["correlation of samples"] = (product, 0.0, 6 / math.sqrt(noise[1:].numel()))
    for name, (value, expected, tolerance) in moments.items():
        if not abs(float(value) - expected) <= tolerance + 1e-3:  # bfloat16 latents round the noise
            return f"the noise drawn is not standard normal: {name} {float(value):.4f}"
    return None
