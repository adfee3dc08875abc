from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from support.direct_reward import BATCH, STEPS, Published, make, settings

from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.guided_sampling import Cost, score_shift, training_free
from sqdf_fast.kernels.philox import derive_seeds
from sqdf_fast.rewards.base import FunctionReward
from sqdf_fast.schedule import DenoisingSchedule, consistency_rows

SCALE = 3.0


@pytest.fixture(scope="module")
def model(low_contrast_model) -> Path:
    return low_contrast_model


@pytest.fixture(scope="module")
def consistent(model, tmp_path_factory):
    """With a consistency LoRA that is not the policy's."""
    folder = tmp_path_factory.mktemp("consistency")
    found = make(settings(model, "draft"))
    found.backbone.family.save_lora(folder, "policy")
    changes = {"consistency_lora": str(folder), "objective": {"lookahead": "consistency"}}
    return make(settings(model, "sqdf", **changes), stirred=False)


def drawn(algorithm, method: str, **options):
    prompts, seeds = algorithm.draw_prompts(2, BATCH)
    return training_free(method, algorithm.runtime, prompts, seeds, **options)


def plain(algorithm, seeds: torch.Tensor, role: str) -> torch.Tensor:
    prompts, _ = algorithm.draw_prompts(2, BATCH)
    return algorithm.runtime.sample(prompts, seeds, role=role).x0


@pytest.fixture(scope="module")
def found(model):
    return make(settings(model, "draft"))


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_the_best_of_n_is_the_candidate_of_the_highest_reward(found, role):
    prompts, seeds = found.draw_prompts(2, BATCH)
    result = drawn(found, "best-of-n", candidates=4, role=role)
    own = [seeds, *(derive_seeds(Stream.CANDIDATE, number, ids=seeds) for number in (1, 2, 3))]
    candidates = [plain(found, one, role) for one in own]
    rewards = torch.stack([found.runtime.rewards(x0, prompts) for x0 in candidates])
    best = rewards.argmax(0)
    assert len(best.unique()) > 1
    expected = torch.stack([candidates[number][sample] for sample, number in enumerate(best.tolist())])
    assert torch.equal(result.x0, expected)
    assert result.cost == Cost(unet_evaluations=4 * BATCH * STEPS * 2, reward_evaluations=4 * BATCH)


@pytest.mark.parametrize(("method", "options"), [("best-of-n", {"candidates": 1}), ("guided", {"scale": 0.0})])
def test_without_a_choice_it_is_plain_sampling(found, method, options):
    _, seeds = found.draw_prompts(2, BATCH)
    result = drawn(found, method, role="policy", **options)
    assert torch.allclose(result.x0, plain(found, seeds, "policy"), rtol=1e-10, atol=1e-12)
    assert (result.cost.unet_backward_rows, result.cost.reward_backward_images) == (0, 0)


def test_guidance_is_universal_guidance(model, found):
    """epsilon - sqrt(1 - A) scale grad r(x0_hat(x_t)), then DDIMScheduler's own step: the published program's."""
    truth = Published(model, found)
    weights, scheduler, x = truth.weights(), truth.scheduler, truth.noise(Stream.INITIAL)
    for i, t in enumerate(scheduler.timesteps):
        x = x.detach().requires_grad_(True)
        eps = truth.predict(weights, x, t)
        x0_hat = scheduler.step(eps, t, x).pred_original_sample
        (gradient,) = torch.autograd.grad(truth.reward(x0_hat).sum(), x)
        eps = eps - (1 - scheduler.alphas_cumprod[t]).sqrt() * SCALE * gradient
        x = truth.step(x.detach(), eps.detach(), i, 1.0).prev_sample
    result = drawn(found, "guided", scale=SCALE, role="policy")
    assert torch.allclose(result.x0, x, rtol=1e-9, atol=1e-10)
    rows = BATCH * STEPS * 2
    assert result.cost == Cost(rows, rows, BATCH * STEPS, BATCH * STEPS)


def test_guidance_through_the_consistency_model(model, consistent):
    """The network that samples is asked without a gradient; x0_hat and its gradient are the consistency model's."""
    result = drawn(consistent, "guided", scale=SCALE, estimate="consistency")
    truth = Published(model, consistent)
    family, schedule, x = consistent.backbone.family, consistent.schedule, truth.noise(Stream.INITIAL)
    rows = consistency_rows(schedule.posterior, schedule.timesteps)
    for i, t in enumerate(truth.scheduler.timesteps):
        x = x.detach().requires_grad_(True)
        with consistent.backbone.role("consistency"):
            output = family.predict(family.network, x, t.expand(BATCH).double(), family.encode(truth.prompts))
        (gradient,) = torch.autograd.grad(truth.reward(rows[i, 0] * x + rows[i, 1] * output).sum(), x)
        with torch.no_grad():
            eps = truth.predict(truth.base, x, t)
        eps = eps - (1 - truth.scheduler.alphas_cumprod[t]).sqrt() * SCALE * gradient
        x = truth.step(x.detach(), eps, i, 1.0).prev_sample
    assert torch.allclose(result.x0, x, rtol=1e-9, atol=1e-10)
    assert result.cost == Cost(BATCH * STEPS * 3, BATCH * STEPS, BATCH * STEPS, BATCH * STEPS)


@pytest.mark.parametrize("method", ["best-of-n", "guided"])
def test_the_reward_rises(found, method):
    prompts, seeds = found.draw_prompts(2, BATCH)
    rewards = [
        found.runtime.rewards(x0, prompts)
        for x0 in (plain(found, seeds, "reference"), drawn(found, method, scale=SCALE).x0)
    ]
    assert rewards[1].mean() > rewards[0].mean() + 0.005


def test_batches_change_nothing(model, found):
    small = make(settings(model, "draft", sampling={"batch_size": 2}))
    one, two = (drawn(each, "guided", scale=SCALE, role="policy") for each in (found, small))
    assert torch.allclose(one.x0, two.x0, rtol=1e-10, atol=1e-12)
    assert one.cost == two.cost


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_shift_of_the_mean_does_not_depend_on_what_the_network_predicts(prediction):
    shifts = []
    for kind in ("epsilon", prediction):
        scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind, beta_schedule="scaled_linear")
        shifts.append(score_shift(DenoisingSchedule.from_scheduler(scheduler, 10)))
    assert torch.allclose(*shifts, rtol=1e-9)
    assert (shifts[0] > 0).all()


def test_the_shift_of_flow_matching():
    """v = epsilon_hat - x0_hat: a score larger by g lowers it by s g + s^2 / (1 - s) g. Pure noise has no shift."""
    schedule = DenoisingSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(), 8)
    s = schedule.levels[1:, 1]
    assert schedule.levels[0, 1] == 1
    assert torch.allclose(score_shift(schedule)[1:], -schedule.transition[1:, 1] * (s + s**2 / (1 - s)), rtol=1e-9)
    assert score_shift(schedule)[0] == 0


def test_what_cannot_be_is_refused_in_one_line(found):
    with pytest.raises(UserError, match="at least 1"):
        drawn(found, "best-of-n", candidates=0)
    with pytest.raises(UserError, match=">= 0"):
        drawn(found, "guided", scale=-1.0)
    with pytest.raises(UserError, match="tweedie"):
        drawn(found, "guided", estimate="consistency")
    with pytest.raises(UserError, match="allowed are best-of-n and guided"):
        drawn(found, "best")
    prompts, seeds = found.draw_prompts(0, 1)
    detached = FunctionReward(lambda images, _: images.detach()[:, 0, 0, 0], "detached", {})
    with pytest.raises(UserError, match="no gradient"):
        training_free("guided", Runtime(found.config, found.backbone, detached), prompts, seeds)
