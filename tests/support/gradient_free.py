"""What the tests of DDPO, DPOK and AWM share, beside the tiny world of direct_reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributions import Normal

from sqdf_fast.algorithms.policy_gradient import PolicyGradient
from support.direct_reward import Published, make, settings

SIZE = 6


def policy_gradient(model: Path, algorithm: str, **changes: Any) -> PolicyGradient:
    """A collection of 6 samples that serves two steps of 6 trajectories each, unless ``changes`` say otherwise."""
    ours = {"optimizer": {"batch_size": SIZE}, "replay": {"refill": SIZE, "steps_per_refill": 2}}
    for key, value in changes.items():
        ours[key] = {**ours.get(key, {}), **value} if isinstance(value, dict) else value
    found = make(settings(model, algorithm, execution={"micro_batch": 5}, **ours))
    assert isinstance(found, PolicyGradient)
    return found


def step(found: PolicyGradient, number: int) -> dict[str, torch.Tensor]:
    """The gradient of step ``number``."""
    parameters = found.backbone.policy_parameters
    for parameter in parameters.values():
        parameter.grad = None
    found.collect(number)
    found.accumulate(number)
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def move(found: PolicyGradient, towards: dict[str, torch.Tensor], size: float) -> None:
    """A plain gradient step of length ``size``, as an optimizer might take."""
    norm = torch.cat([gradient.flatten() for gradient in towards.values()]).norm()
    with torch.no_grad():
        for name, parameter in found.backbone.policy_parameters.items():
            parameter.sub_(towards[name], alpha=float(size / norm))


class PublishedTransitions(Published):
    """Log-probabilities of a collection's transitions by DDIMScheduler.step and torch.distributions."""

    def __init__(self, model: Path, found: PolicyGradient) -> None:
        super().__init__(model, found)
        assert found.collection is not None
        self.states, self.rewards = found.collection.stored, found.collection.rewards
        self.prompts = found.collection.prompts
        self.trained = torch.nonzero(found.schedule.trainable)[:, 0].tolist()

    def advantages(self) -> torch.Tensor:
        centred = self.rewards - self.rewards.mean()
        return (centred / (centred.square().mean().sqrt() + 1e-8)).clamp(-5, 5)

    def transition(self, weights, i: int) -> Normal:
        """p(x_{t-1} | x_t) of every sample at index i."""
        t, x = self.scheduler.timesteps[i], self.states[:, i]
        mean = self.scheduler.step(self.predict(weights, x, t), t, x, eta=1.0, variance_noise=torch.zeros_like(x))
        variance = self.scheduler._get_variance(int(t), int(t) - 1000 // len(self.scheduler.timesteps))
        return Normal(mean.prev_sample, variance.sqrt())

    def log_probs(self) -> torch.Tensor:
        """[K, n], with the gradient of the LoRA."""
        weights = self.weights()
        transitions = [(self.transition(weights, i), self.states[:, i + 1]) for i in self.trained]
        return torch.stack([found.log_prob(x_prev).mean((1, 2, 3)) for found, x_prev in transitions])
