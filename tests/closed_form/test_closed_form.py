"""Training through the schedule, the kernels, the loss and the replay buffer reaches the closed form."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from support.marks import slow

from sqdf_fast.objective import credit_weight


def load():
    path = Path(__file__).parents[2] / "examples" / "closed_form.py"
    spec = importlib.util.spec_from_file_location("examples_closed_form", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = load()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("mode", "gamma", "kl_scale"),
    [
        ("uniform", 0.9, 1.0),
        ("uniform", 1.0, 0.5),
        ("prioritised", 0.9, 1.0),
        ("prioritised", 1.0, 1.0),
        ("on-policy", 0.9, 0.5),
        ("on-policy", 1.0, 1.0),
    ],
)
def test_gaussian(mode, gamma, kl_scale):
    """Mean and standard deviation of x_0 within 0.5 % of the recursion, for every buffer and discount."""
    schedule = world.stable_diffusion_schedule(10)
    target, beta = torch.tensor([2.0, -1.0], dtype=torch.float64), 1.0
    policy = world.Policy(world.gaussian_world(schedule, target, offset=4.0), world.affine, 2)
    before = world.learned_moments(policy)
    world.train(policy, alpha=beta / kl_scale, gamma=gamma, mode=mode, kl_scale=kl_scale, steps=300, batch_size=1024)
    mean, std = world.learned_moments(policy)
    weight = credit_weight(schedule, torch.arange(10), gamma=gamma)
    expected_mean, expected_std = world.predicted_moments(schedule, target, weight, beta)
    torch.testing.assert_close(mean, expected_mean, rtol=0.005, atol=0)
    torch.testing.assert_close(std, expected_std, rtol=0.005, atol=0)
    assert (mean - before[0]).abs().min() > 0.25
    assert (std - before[1]).abs().min() > 0.1


def test_gaussian_sampled():
    """The moments that sampling the trained policy gives are those computed from its parameters."""
    schedule, target = world.stable_diffusion_schedule(10), torch.tensor([2.0], dtype=torch.float64)
    policy = world.Policy(world.gaussian_world(schedule, target), world.affine, 1)
    world.train(policy, alpha=0.5, gamma=1.0, steps=150, batch_size=1024)
    x0, states = world.trajectories(policy, 200_000, 1, torch.Generator().manual_seed(1))
    mean, std = world.learned_moments(policy)
    assert states.shape == (200_000, int(schedule.trainable.sum()), 1)
    # five standard errors of 200,000 samples
    assert x0.mean().item() == pytest.approx(mean.item(), abs=5 * std.item() / math.sqrt(200_000))
    assert x0.std().item() == pytest.approx(std.item(), abs=5 * std.item() / math.sqrt(400_000))


def test_gaussian_with_posterior_credit():
    schedule, target = world.stable_diffusion_schedule(10), torch.tensor([2.0], dtype=torch.float64)
    policy = world.Policy(world.gaussian_world(schedule, target), world.affine, 1)
    world.train(policy, alpha=0.5, gamma=1.0, credit="posterior", steps=300, batch_size=1024)
    weight = credit_weight(schedule, torch.arange(10), "posterior", beta=1.0)
    expected = world.predicted_moments(schedule, target, weight, 1.0)
    torch.testing.assert_close(world.learned_moments(policy), expected, rtol=0.005, atol=0)


def test_known_moments():
    """50 steps, c = 2, beta = 1: the numbers that the closed form is known to give."""
    schedule = world.stable_diffusion_schedule(50, math.inf)
    target = torch.tensor([2.0], dtype=torch.float64)

    def moments(pair):
        mean, std = pair
        return [round(mean.item(), 3), round(std.item() ** 2, 3)]

    index = torch.arange(50)
    for gamma, expected in ((1.0, [1.169, 0.430]), (0.9, [0.323, 0.694])):
        weight = credit_weight(schedule, index, gamma=gamma)
        assert moments(world.predicted_moments(schedule, target, weight, 1.0)) == expected
    assert moments(world.exact_moments(schedule, target, 1.0)) == [0.941, 0.481]
    fine = world.stable_diffusion_schedule(200, math.inf)
    weight = credit_weight(fine, torch.arange(200), "posterior", beta=1.0)
    assert moments(world.predicted_moments(fine, target, weight, 1.0)) == [0.969, 0.499]


@pytest.mark.parametrize("gamma", [slow(1.0), 0.9])
def test_mixture(gamma):
    """Total variation at most 0.02 to the chain of per-state minimizers, far from the untrained chain."""
    schedule, beta = world.stable_diffusion_schedule(8), 0.5
    mixture = world.mixture_world(schedule)
    policy = world.mixture_policy(mixture)
    untrained = world.chain_density(schedule, world.policy_means(policy))
    world.train(policy, alpha=beta / 2, gamma=gamma, steps=300, batch_size=2048)
    trained = world.chain_density(schedule, world.policy_means(policy))
    best = world.chain_density(schedule, world.minimizing_means(mixture, gamma=gamma, beta=beta))
    assert world.total_variation(trained, best) <= 0.02
    assert world.total_variation(untrained, best) > 0.4


def test_quadrature():
    nodes, weights = world.gauss_hermite(12)
    moments = [(weights * nodes**k).sum().item() for k in range(7)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15], abs=1e-12)
