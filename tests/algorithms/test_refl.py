from __future__ import annotations

import pytest
import torch
from support.direct_reward import BATCH, STEPS, Published, apart, gradient, make, settings


@pytest.mark.parametrize("margin", [None, 0.02, 100.0])
def test_its_gradient_is_the_published_one(model, margin):
    """x_t without a gradient, DDIMScheduler's pred_original_sample with one; the published map is relu(margin - r)."""
    found = make(settings(model, "refl", refl={"window": 1.0, "margin": margin}))
    ours = gradient(found)
    truth, index = Published(model, found), found._start.index
    weights, rewards = truth.weights(), []
    for number in range(BATCH):
        row, i = slice(number, number + 1), int(index[number])
        x = truth.state(i, row)
        eps = truth.predict(weights, x, truth.scheduler.timesteps[i], row)
        x0_hat = truth.step(x, eps, i, 1.0, row).pred_original_sample
        rewards.append(truth.reward(x0_hat, row))
    reward = torch.cat(rewards)
    if margin == 0.02:
        assert 0 < int((reward > margin).sum()) < BATCH
    loss = -reward if margin is None else torch.relu(margin - reward)
    assert apart(ours, truth.gradient(loss.mean())) < 1e-10
    result = found.accumulate(2)
    assert float(result.loss) == pytest.approx(loss.mean().item(), rel=1e-10)
    assert result.reward.tolist() == pytest.approx(reward.tolist(), rel=1e-10)


def test_every_sample_is_its_own_draw_among_the_last_steps(model):
    found = make(settings(model, "refl", refl={"window": 0.5}, optimizer={"batch_size": 12}))
    drawn = []
    for step in range(3):
        before = found.backbone.evaluations
        found.collect(step)
        index = found._start.index
        assert found.backbone.evaluations - before == 2 * int(index.sum())
        drawn.append(index.tolist())
    assert {i for indices in drawn for i in indices} == {STEPS - 2, STEPS - 1}
    assert drawn[0] != drawn[1] != drawn[2]
    found.collect(0)
    assert found._start.index.tolist() == drawn[0]


def test_the_states_are_those_of_the_samples_at_their_index(model):
    found = make(settings(model, "refl", refl={"window": 1.0}))
    found.collect(2)
    start, truth = found._start, Published(model, found)
    assert len(start.index.unique()) > 2
    for number, i in enumerate(start.index.tolist()):
        row = slice(number, number + 1)
        assert torch.allclose(start.x[row], truth.state(i, row), rtol=1e-10, atol=1e-12)


def test_a_window_smaller_than_a_step_is_the_last_step(model):
    found = make(settings(model, "refl", refl={"window": 0.01}))
    found.collect(0)
    assert found._start.index.tolist() == [STEPS - 1] * BATCH
