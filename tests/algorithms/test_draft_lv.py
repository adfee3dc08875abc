from __future__ import annotations

import pytest
import torch
from support.direct_reward import BATCH, STEPS, Published, apart, gradient, make, settings

from sqdf_fast.engine.noise import Stream


@pytest.mark.parametrize("noises", [1, 3])
def test_its_gradient_is_the_published_one(model, noises):
    """DRaFT-1's, and that of the image noised with DDIMScheduler.add_noise and predicted anew, n times."""
    found = make(settings(model, "draft-lv", draft_lv={"noises": noises}))
    truth = Published(model, found)
    weights, last = truth.weights(), truth.scheduler.timesteps[-1:]
    x = truth.state(STEPS - 1)
    x0 = truth.step(x, truth.predict(weights, x, last), STEPS - 1, 1.0).prev_sample
    rewards = [truth.reward(x0)]
    for number in range(noises):
        epsilon = truth.noise(Stream.RENOISING, number)
        x1 = truth.scheduler.add_noise(x0.detach(), epsilon, last.repeat(BATCH))
        predicted = truth.scheduler.step(truth.predict(weights, x1, last), last[0], x1).pred_original_sample
        rewards.append(truth.reward(predicted))
    loss = -torch.stack(rewards).mean()
    assert apart(gradient(found), truth.gradient(loss)) < 1e-10
    result = found.accumulate(2)
    assert result.reward.tolist() == pytest.approx(rewards[0].tolist(), rel=1e-10)
    assert float(result.loss) == pytest.approx(loss.item(), rel=1e-10)
    assert result.kl is None
