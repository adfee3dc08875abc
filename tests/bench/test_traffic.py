from __future__ import annotations

import pytest
import torch
from cases.ops import bytes_moved, formula
from cases.parity import make

from sqdf_fast.kernels import denoise_step_staged
from sqdf_fast.kernels.spec import GUIDANCE_SCALE, Problem

LATENTS = ("sd15", (2, 4, 8, 8))


def streamed(tensors, problem):
    """Bytes of the tensors with at least as many elements as x."""
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() >= problem.elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_denoise_step_moves_its_tensors_once(noise, dtype):
    problem = Problem("denoise_step", *LATENTS, dtype, "cpu", noise)
    setup = make(problem)
    outputs = denoise_step_staged(**setup.inputs.given, guidance_scale=GUIDANCE_SCALE, impl="reference")
    delta = outputs[2]
    forward = streamed([*setup.inputs.given.values(), *outputs], problem)
    backward = streamed([*setup.inputs.cotangents, delta, *setup.backward(outputs[:2])], problem)
    assert bytes_moved(problem, "forward") == forward
    assert bytes_moved(problem, "backward") == backward
    assert bytes_moved(problem, "both") == forward + backward == (13 if noise == "given" else 12) * 512 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_posterior_mean_moves_its_tensors_once(dtype):
    problem = Problem("posterior_mean", *LATENTS, dtype, "cpu", "")
    setup = make(problem)
    outputs = setup.forward("reference")()
    forward = streamed([*setup.inputs.given.values(), *outputs], problem)
    backward = streamed([*setup.inputs.cotangents, *setup.backward(outputs)], problem)
    assert bytes_moved(problem, "forward") == forward
    assert bytes_moved(problem, "backward") == backward
    assert bytes_moved(problem, "both") == forward + backward


def test_philox_writes_its_noise_and_the_loss_streams_nothing():
    problem = Problem("philox", *LATENTS, torch.float32, "cpu", "drawn")
    assert bytes_moved(problem, "forward") == make(problem).forward("reference")()[0].nbytes
    assert bytes_moved(Problem("discounted_loss", "4x64", (4, 64), torch.float32, "cpu", ""), "both") == 0


def test_the_formula_says_what_is_counted():
    problem = Problem("denoise_step", *LATENTS, torch.float32, "cpu", "given")
    assert formula(problem, "both") == "13 N e, N = 512, e = 4"
