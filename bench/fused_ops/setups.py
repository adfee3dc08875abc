"""One setup factory: the inputs of a problem, its cotangents, and every implementation as a callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops import baselines
from fused_ops.cases import GUIDANCE_SCALE, Problem
from sqdf_fast.kernels import denoise_step, discounted_loss, philox_normal, posterior_mean

Forward = Callable[[], tuple[Tensor, ...]]

_TABLE_ROWS = 50
_GAMMA, _ALPHA = 0.9, 0.01


@dataclass(frozen=True)
class Setup:
    """The tensors of a problem: `inputs` by name, cotangents of the outputs, names of what is differentiated.

    `noise` is what truth adds: the noise given, or what the counter-based generator makes of the seed.
    """

    problem: Problem
    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]
    cotangents: tuple[Tensor, ...]
    noise: Tensor | None

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the leaves, of the graph that `outputs` hang on."""
        return torch.autograd.grad(outputs, [self.inputs[name] for name in self.leaves], self.cotangents)


def make(problem: Problem) -> Setup:
    """Random inputs on the problem's device, the same for the same problem."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device, problem.dtype)

    return {
        "denoise_step": _denoise_step,
        "posterior_mean": _posterior_mean,
        "discounted_loss": _discounted_loss,
        "philox": _philox,
    }[problem.op](problem, normal)


def forward(setup: Setup, implementation: str) -> Forward:
    """The forward of an implementation on the setup's inputs; "compile" is compiled for these shapes alone."""
    if implementation not in ("eager", "compile"):
        return _ours(setup, implementation)
    if implementation == "eager":
        return _plain(setup, lambda function: function)
    torch.compiler.reset()  # a recompilation limit is no part of what is measured
    return _plain(setup, lambda function: torch.compile(function, fullgraph=True, dynamic=False))


def _plain(setup: Setup, treat: Callable[[Callable], Callable]) -> Forward:
    op, given = setup.problem.op, setup.inputs
    if op == "philox":
        return lambda: (torch.randn(setup.problem.shape, device=setup.problem.device),)
    if op == "discounted_loss":
        loss = treat(baselines.discounted_loss)
        return lambda: (loss(given["reward"], given["kl"], given["remaining"], _GAMMA, _ALPHA),)
    if op == "posterior_mean":
        mean = treat(baselines.posterior_mean)
        arguments = [given[name] for name in ("x", "model_output", "posterior", "index")]
        return lambda: (mean(*arguments, GUIDANCE_SCALE),)
    arguments = [given[name] for name in ("x", "policy", "reference", "transition", "index")]
    if setup.problem.noise == "drawn" and setup.problem.device == "cuda":
        drawing = treat(baselines.denoise_step_drawing)
        return lambda: drawing(*arguments, GUIDANCE_SCALE)
    step = treat(baselines.denoise_step)
    if setup.problem.noise == "given":
        return lambda: step(*arguments, GUIDANCE_SCALE, given["noise"])
    # Inductor's generator on the CPU is scalar code, many times slower than torch.randn: draw before the graph.
    return lambda: step(*arguments, GUIDANCE_SCALE, torch.randn_like(given["x"]))


def _ours(setup: Setup, implementation: str) -> Forward:
    given, impl = setup.inputs, implementation
    if setup.problem.op == "philox":
        return lambda: (philox_normal(given["seed"], setup.problem.shape[1:], impl=impl),)
    if setup.problem.op == "discounted_loss":
        return lambda: (discounted_loss(**given, gamma=_GAMMA, alpha=_ALPHA, impl=impl),)
    if setup.problem.op == "posterior_mean":
        return lambda: (posterior_mean(**given, guidance_scale=GUIDANCE_SCALE, impl=impl),)
    return lambda: denoise_step(**given, guidance_scale=GUIDANCE_SCALE, impl=impl)


def _denoise_step(problem: Problem, normal: Callable[..., Tensor]) -> Setup:
    batch, *sample = problem.shape
    reference = _network_output(batch, sample, normal)
    policy = reference + 0.02 * normal(2 * batch, *sample)
    inputs = {
        "x": normal(*problem.shape).requires_grad_(),
        "policy": policy.requires_grad_(),
        "reference": reference,
        "transition": _table(3, problem.device),
        "index": _index(batch, problem.device),
    }
    if problem.noise == "given":
        inputs["noise"] = noise = normal(*problem.shape)
    else:
        inputs["seed"] = _seed(batch, problem.device)
        noise = philox_normal(inputs["seed"], sample, impl="reference")
    kl_cotangent = torch.linspace(0.5, 1.5, batch, device=problem.device)
    return Setup(problem, inputs, ("x", "policy"), (normal(*problem.shape), kl_cotangent), noise)


def _posterior_mean(problem: Problem, normal: Callable[..., Tensor]) -> Setup:
    batch, *sample = problem.shape
    inputs = {
        "x": normal(*problem.shape).requires_grad_(),
        "model_output": _network_output(batch, sample, normal).requires_grad_(),
        "posterior": _table(2, problem.device),
        "index": _index(batch, problem.device),
    }
    return Setup(problem, inputs, ("x", "model_output"), (normal(*problem.shape),), None)


def _discounted_loss(problem: Problem, normal: Callable[..., Tensor]) -> Setup:
    inputs = {
        "reward": normal(*problem.shape).requires_grad_(),
        "kl": normal(*problem.shape).square().requires_grad_(),
        "remaining": torch.arange(problem.elements, device=problem.device).reshape(problem.shape) % _TABLE_ROWS,
    }
    inputs["kl"] = inputs["kl"].detach().requires_grad_()
    return Setup(problem, inputs, ("reward", "kl"), (torch.ones((), device=problem.device),), None)


def _philox(problem: Problem, normal: Callable[..., Tensor]) -> Setup:
    seed = _seed(problem.shape[0], problem.device)
    noise = philox_normal(seed, problem.shape[1:], impl="reference")
    return Setup(problem, {"seed": seed}, (), (), noise)


def _network_output(batch: int, sample: list[int], normal: Callable[..., Tensor]) -> Tensor:
    # Two halves that agree but for a tenth, as a prompt's effect on a network's output: [2B, ...].
    unconditional = normal(batch, *sample)
    return torch.cat([unconditional, unconditional + 0.1 * normal(batch, *sample)])


def _table(columns: int, device: str) -> Tensor:
    ramp = torch.linspace(0.3, 0.9, _TABLE_ROWS)
    return torch.stack([1.0 + 0.1 * ramp, -0.5 * ramp, ramp][:columns], dim=1).to(device)


def _index(batch: int, device: str) -> Tensor:
    return (torch.arange(batch, device=device) * 7) % _TABLE_ROWS


def _seed(batch: int, device: str) -> Tensor:
    return torch.arange(batch, device=device) * 1_000_003 + 17
