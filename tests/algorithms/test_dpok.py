from __future__ import annotations

import torch
from support.direct_reward import apart
from support.gradient_free import SIZE, PublishedTransitions, move, policy_gradient, step
from torch.distributions import kl_divergence


def published_loss(truth: PublishedTransitions, old: torch.Tensor | None, clip: float, alpha: float) -> torch.Tensor:
    """The published program's -advantage clamp(ratio), and the exact Gaussian KL of each transition, per element."""
    log_probs = truth.log_probs()
    ratio = (log_probs - (log_probs.detach() if old is None else old)).exp().clamp(1 - clip, 1 + clip)
    weights, divergences = truth.weights(), []
    for i in truth.trained:
        policy, reference = (truth.transition(found, i) for found in (weights, truth.base))
        divergences.append(kl_divergence(policy, reference).mean((1, 2, 3)))
    return (-truth.advantages() * ratio + alpha * torch.stack(divergences)).mean()


def test_the_first_update_is_the_published_gradient(model):
    found = policy_gradient(model, "dpok", objective={"alpha": 0.7, "kl_scale": 0.5})
    ours = step(found, 0)
    truth = PublishedTransitions(model, found)
    assert apart(ours, truth.gradient(published_loss(truth, None, 1e-4, 0.7))) < 1e-10
    without = truth.gradient(published_loss(truth, None, 1e-4, 0.0))
    assert apart(ours, without) > 1e-2


def test_beyond_the_range_there_is_no_policy_gradient(model):
    """Unlike PPO's, this clamp is blind to the advantage's sign: what is outside does not come back by itself."""
    clip = 2e-3
    found = policy_gradient(model, "dpok", objective={"alpha": 0.7, "kl_scale": 0.5}, dpok={"clip_range": clip})
    towards = step(found, 0)
    old = PublishedTransitions(model, found).log_probs().detach()
    move(found, towards, 0.02)
    ours = step(found, 1)
    truth = PublishedTransitions(model, found)
    outside = ((truth.log_probs() - old).exp() - 1).abs() > clip
    assert 0 < outside.sum() < outside.numel()
    assert apart(ours, truth.gradient(published_loss(truth, old, clip, 0.7))) < 1e-10


def test_the_kl_that_is_logged_is_that_of_every_transition(model):
    found = policy_gradient(model, "dpok", objective={"alpha": 0.7, "kl_scale": 1.0}, replay={"steps_per_refill": 1})
    found.collect(0)
    result = found.accumulate(0)
    truth, pairs = PublishedTransitions(model, found), found._pairs(0, 1)
    expected = torch.zeros(4, SIZE, dtype=torch.float64)
    with torch.no_grad():
        for i in truth.trained:
            policy, reference = (truth.transition(weights, i) for weights in (truth.weights(), truth.base))
            expected[i] = 2 * kl_divergence(policy, reference).mean((1, 2, 3))
    assert torch.allclose(result.kl, expected[pairs.index, pairs.trajectory], rtol=1e-9)
    assert result.kl.min() > 0


def test_without_alpha_the_reference_is_not_run(model):
    found = policy_gradient(model, "dpok", objective={"alpha": 0.0}, replay={"steps_per_refill": 1})
    found.collect(0)
    before = found.backbone.evaluations
    assert found.accumulate(0).kl is None
    assert found.backbone.evaluations - before == 2 * 3 * SIZE
