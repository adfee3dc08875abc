from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from support.direct_reward import apart
from support.gradient_free import SIZE, PublishedTransitions, move, policy_gradient, step

from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.kernels.philox import philox_normal


class PublishedMatching(PublishedTransitions):
    """The published program's log-probabilities on the pairs of a step: add_noise, get_velocity and a mean square."""

    def __init__(self, model: Path, found, offset: int) -> None:
        super().__init__(model, found)
        pairs = found._pairs(offset, offset + 1)
        seeds = sample_seeds(found.config.seed, Stream.TRANSITION, 0, pairs.number)
        self.noises = philox_normal(seeds, (4, 8, 8), dtype=torch.float64)
        self.times = self.scheduler.timesteps[pairs.index]
        self.clean, self.taken = self.states[pairs.trajectory], pairs.trajectory
        self.asked = [self.prompts[i] for i in pairs.trajectory.tolist()]
        self.prediction = found.schedule.prediction

    def outputs(self, weights) -> torch.Tensor:
        self.prompts = self.asked
        x = self.scheduler.add_noise(self.clean, self.noises, self.times)
        return self.predict(weights, x, torch.cat([self.times, self.times]))

    def log_probs(self, weighting: str = "uniform") -> torch.Tensor:
        targets = {
            "epsilon": self.noises,
            "v_prediction": self.scheduler.get_velocity(self.clean, self.noises, self.times),
            "sample": self.clean,
            "flow": self.noises - self.clean,
        }
        log_prob = -((self.outputs(self.weights()) - targets[self.prediction]) ** 2).mean((1, 2, 3))
        if weighting == "ghuber":
            return -((-log_prob + 1e-10).pow(0.25) - 1e-10**0.25) * (self.times.double() / 1000) / 0.25
        return log_prob

    def loss(self, log_probs: torch.Tensor, old: torch.Tensor, clip: float, beta: float) -> torch.Tensor:
        gain = ((self.rewards - self.rewards.mean()) / (self.rewards.std(correction=0) + 1e-4))[self.taken].clamp(-5, 5)
        ratio = (log_probs - old).exp()
        policy = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)).mean()
        with torch.no_grad():
            reference = self.outputs(self.base)
        return policy + beta * ((self.outputs(self.weights()) - reference) ** 2).mean((1, 2, 3)).mean()


@pytest.mark.parametrize(("matching", "alpha"), [("uniform", 0.3), ("ghuber", 0.0)])
def test_the_first_update_is_the_published_gradient(model, matching, alpha):
    found = policy_gradient(model, "awm", awm={"matching": matching}, objective={"alpha": alpha})
    ours = step(found, 0)
    truth = PublishedMatching(model, found, 0)
    log_probs = truth.log_probs(matching)
    assert apart(ours, truth.gradient(truth.loss(log_probs, log_probs.detach(), 1.0, alpha))) < 1e-10


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_the_target_is_what_the_network_was_pretrained_on(model, prediction):
    found = policy_gradient(model, "awm", replay={"steps_per_refill": 1})
    found.schedule = dataclasses.replace(found.schedule, prediction=prediction)
    ours = step(found, 0)
    truth = PublishedMatching(model, found, 0)
    log_probs = truth.log_probs()
    assert apart(ours, truth.gradient(truth.loss(log_probs, log_probs.detach(), 1.0, 0.3))) < 1e-10


def test_later_updates_of_a_collection_are_clipped_as_published(model):
    clip = 1e-3
    found = policy_gradient(model, "awm", awm={"clip_range": clip})
    towards = step(found, 0)
    old = PublishedMatching(model, found, 1).log_probs().detach()
    move(found, towards, 0.02)
    ours = step(found, 1)
    truth = PublishedMatching(model, found, 1)
    log_probs = truth.log_probs()
    outside = ((log_probs - old).exp() - 1).abs() > clip
    assert 0 < outside.sum() < outside.numel()
    assert apart(ours, truth.gradient(truth.loss(log_probs, old, clip, 0.3))) < 1e-10


def test_every_pair_has_noise_of_its_own_and_no_states_are_stored(model):
    found = policy_gradient(model, "awm")
    found.collect(0)
    assert found.collection.stored.shape == (SIZE, 4, 8, 8)
    noises = torch.cat([PublishedMatching(model, found, offset).noises for offset in (0, 1)]).flatten(1)
    assert len(noises) == 2 * 3 * SIZE
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.4


def test_the_kl_that_is_logged_is_that_of_the_transition(model):
    found = policy_gradient(model, "awm", objective={"kl_scale": 0.5}, replay={"steps_per_refill": 1})
    found.collect(0)
    result = found.accumulate(0)
    truth = PublishedMatching(model, found, 0)
    with torch.no_grad():
        square = ((truth.outputs(truth.weights()) - truth.outputs(truth.base)) ** 2).mean((1, 2, 3))
    _, q, sigma = found.schedule.transition[result.index].unbind(1)
    assert torch.allclose(result.kl, 0.5 * square * (q / sigma) ** 2, rtol=1e-9)


def test_indices_come_from_equal_stretches(model):
    found = policy_gradient(model, "awm", sampling={"num_inference_steps": 12}, awm={"timesteps": 3})
    trained = len(found.indices)
    bounds = [number * trained // 3 for number in range(4)]
    columns = found._columns(500, torch.Generator().manual_seed(0))
    for number, (first, beyond) in enumerate(itertools.pairwise(bounds)):
        assert sorted(columns[:, number].unique().tolist()) == list(range(first, beyond))
