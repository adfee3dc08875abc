"""Every family through the executors: its latents, its rows and its blocks are what they take them for."""

from __future__ import annotations

import pytest
import torch
from support.tiny_families import WRITERS

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine import make_executor
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.families import load_family
from sqdf_fast.replay import ReplayBatch

PROMPTS = ["a red star", "a ring", "a blue ring"]


def brightness(images, prompts):
    return (images - 0.3).square().mean(dim=(1, 2, 3))


def gradients(folder, name, execution, **objective):
    resolution = 16 if name == "flux" else None
    family = load_family(str(folder), device=torch.device("cpu"), dtype=torch.float64, resolution=resolution)
    backbone = Backbone(family, rank=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.policy_parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    executor = make_executor(
        backbone,
        family.schedule(4, family.defaults.eta),
        brightness,
        Objective(lookahead="tweedie", **objective),
        guidance_scale=3.0 if family.guided else 1.0,
        execution=execution,
    )
    x = torch.randn(3, *family.latent_shape, dtype=torch.float64, generator=generator)
    batch = ReplayBatch(x, torch.tensor([0, 2, 1]), PROMPTS, torch.arange(3))
    result = executor.accumulate(batch, sample_seeds(0, Stream.TRANSITION, 0, 3))
    assert torch.isfinite(torch.as_tensor(result.loss)).all()
    assert (torch.as_tensor(result.kl) > 0).any()
    recomputed = sum(part.count for part in backbone.checkpointed)
    found = {key: parameter.grad for key, parameter in backbone.policy_parameters.items()}
    return found, recomputed


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_staged_and_recomputed_gradients_are_the_joint_ones(models, name):
    joint, _ = gradients(models[name], name, Execution(executor="joint", micro_batch=3))
    staged, recomputed = gradients(
        models[name], name, Execution(backward_batch_rows=2, gradient_checkpointing=("network",))
    )
    assert recomputed > 0
    assert joint.keys() == staged.keys()
    scale = max(gradient.norm() for gradient in joint.values())
    assert scale > 0
    for key, gradient in joint.items():
        assert gradient is not None, key
        assert (staged[key] - gradient).norm() < 1e-10 * scale, key
