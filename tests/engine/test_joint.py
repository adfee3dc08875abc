from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.joint import JointExecutor
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.families import load_family
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.schedule import DenoisingSchedule

PROMPTS = ["a red star", "a blue ring", "a ring", "a star", "a red ring"]
SEEDS = sample_seeds(0, Stream.TRANSITION, 0, 5)


def brightness(images: torch.Tensor, prompts) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3)) * torch.tensor([len(prompt) for prompt in prompts])


def executor(model: Path, micro_batch: int = 5, stirred: bool = True, **objective) -> JointExecutor:
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    backbone = Backbone(family, rank=2)
    if stirred:
        with torch.no_grad():
            for number, parameter in enumerate(backbone.policy_parameters.values()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    schedule = DenoisingSchedule.from_scheduler(family.scheduler, 4)
    settings = Objective(**{"lookahead": "tweedie", **objective})
    return JointExecutor(
        backbone,
        schedule,
        brightness,
        settings,
        guidance_scale=3.0,
        execution=Execution(executor="joint", micro_batch=micro_batch),
    )


def batch(index: list[int]) -> ReplayBatch:
    x = torch.randn(len(index), 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return ReplayBatch(x, torch.tensor(index), PROMPTS[: len(index)], torch.arange(len(index)))


def gradients(found: JointExecutor) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in found.backbone.policy_parameters.values()])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("objective", [{}, {"mask_nonpositive": True}, {"credit": "posterior"}])
def test_micro_batches_add_up_to_the_whole(model, micro_batch, objective):
    whole, parts = executor(model, **objective), executor(model, micro_batch, **objective)
    one = whole.accumulate(batch([0, 3, 1, 2, 3]), SEEDS)
    two = parts.accumulate(batch([0, 3, 1, 2, 3]), SEEDS)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-12)
    assert torch.allclose(one.kl, two.kl, rtol=1e-12)
    assert torch.allclose(gradients(whole), gradients(parts), rtol=1e-9, atol=1e-15)
    assert gradients(whole).abs().max() > 0


def test_a_fresh_policy_has_no_kl_and_no_gradient_of_it(model):
    free, held = executor(model, stirred=False, alpha=0.0), executor(model, stirred=False, alpha=1e6)
    assert torch.equal(free.accumulate(batch([0, 1, 2, 3]), SEEDS[:4]).kl, torch.zeros(4))
    assert torch.equal(held.accumulate(batch([0, 1, 2, 3]), SEEDS[:4]).kl, torch.zeros(4))
    assert torch.equal(gradients(free), gradients(held))


def test_the_last_index_is_scored_without_a_network_call(model):
    found = executor(model)
    found.accumulate(batch([3, 3]), SEEDS[:2])
    last = found.backbone.evaluations
    found.accumulate(batch([0, 3]), SEEDS[:2])
    # Policy and reference run both guidance halves of two samples; the look-ahead those of one.
    assert last == 2 * 2 * 2
    assert found.backbone.evaluations - last == 2 * 2 * 2 + 2


def test_the_loss_is_the_sum_of_its_parts(model):
    found = executor(model, alpha=0.7, gamma=0.5)
    result = found.accumulate(batch([0, 1, 3]), SEEDS[:3])
    weight = torch.tensor([0.125, 0.25, 1.0], dtype=torch.float64)
    assert float(result.loss) == pytest.approx(float((-weight * result.reward + 0.7 * result.kl).mean()), rel=1e-12)
    assert result.kl.min() > 0


def test_lookaheads_see_different_pictures(model):
    rewards = [
        executor(model, **objective).accumulate(batch([0, 1]), SEEDS[:2]).reward
        for objective in ({"lookahead": "tweedie"}, {"lookahead": "deterministic", "lookahead_steps": 2})
    ]
    assert not torch.allclose(*rewards)


def test_gradients_accumulate_over_calls(model):
    found = executor(model)
    found.accumulate(batch([0, 1]), SEEDS[:2])
    once = gradients(found).clone()
    found.accumulate(batch([0, 1]), SEEDS[:2])
    assert torch.allclose(gradients(found), 2 * once, rtol=1e-12)
