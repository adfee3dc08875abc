"""Train SQDF where the answer is known, with the real loss and replay buffer, and compare with the closed form.

    python examples/closed_form.py [--output docs/closed_form.md]

The data follow a mixture of Gaussians, so the pretrained network is exact, and the problem is small enough for the
policy to represent any relevant function of the state. SQDF must then converge to the minimizer of its loss at each
state (docs/algorithm.md), and its distance to the optimum of the original problem can be computed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sqdf_fast.kernels import posterior_mean
from sqdf_fast.objective import Credit, credit_weight, look_ahead, sqdf_loss
from sqdf_fast.replay import Mode, ReplayBuffer
from sqdf_fast.schedule import TRAINABLE_RATIO, DenoisingSchedule


@dataclass(frozen=True)
class World:
    """Data x_0 [D] with independent elements, each from a mixture of Gaussians, and a reward.

    Attributes:
        schedule: the sampler's coefficients.
        means, stds, weights: mixture parameters, [components].
        reward: function x_0 [B, D] -> r [B].
    """

    schedule: DenoisingSchedule
    means: Tensor
    stds: Tensor
    weights: Tensor
    reward: Callable[[Tensor], Tensor]

    def network(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The exact pretrained network: epsilon*(x) = -noise d log p_t(x) / dx, elementwise."""
        alphas = self.schedule.alphas_cumprod[timesteps.long()][..., None, None]
        variance = alphas * self.stds**2 + 1 - alphas
        centered = x[..., None] - alphas.sqrt() * self.means
        responsibility = (self.weights.log() - 0.5 * (variance.log() + centered**2 / variance)).softmax(-1)
        return (1 - alphas[..., 0]).sqrt() * (responsibility * centered / variance).sum(-1)


class Policy(torch.nn.Module):
    """m = epsilon*(x) + sum_f w[index, f] phi_f(x), elementwise; starts at epsilon*."""

    def __init__(self, world: World, features: Callable[[Tensor], Tensor], elements: int) -> None:
        super().__init__()
        self.world, self.features = world, features
        number = features(torch.zeros(1, elements, dtype=torch.float64)).shape[-1]
        self.weight = torch.nn.Parameter(torch.zeros(len(world.schedule), elements, number, dtype=torch.float64))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.world.network(x, self.world.schedule.timesteps[index]) + self.shift(x, index)

    def shift(self, x: Tensor, index: Tensor) -> Tensor:
        """m - epsilon*(x)."""
        return (self.weight[index] * self.features(x)).sum(-1)


def affine(x: Tensor) -> Tensor:
    """Features x and 1 of each element: [B, D] -> [B, D, 2]."""
    return torch.stack([x, torch.ones_like(x)], dim=-1)


def hats(knots: Tensor) -> Callable[[Tensor], Tensor]:
    """Features of a piecewise linear function on equidistant knots that is constant beyond them."""
    spacing = knots[1] - knots[0]

    def features(x: Tensor) -> Tensor:
        inside = x.clamp(knots[0], knots[-1])[..., None]
        return (1 - (inside - knots).abs() / spacing).clamp(min=0)

    return features


@torch.no_grad()
def trajectories(policy: Policy, number: int, elements: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample the policy. Returns x_0 [n, D] and x_t at the trainable indices [n, K, D]."""
    schedule = policy.world.schedule
    x = torch.randn(number, elements, dtype=torch.float64, generator=generator)
    states = []
    for i in range(len(schedule)):
        if schedule.trainable[i]:
            states.append(x)
        index = torch.full((number,), i)
        z = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        mean = posterior_mean(x, policy(x, index), schedule.transition[:, :2], index)
        x = mean + schedule.transition[i, 2] * z
    return x, torch.stack(states, dim=1)


def train(
    policy: Policy,
    *,
    alpha: float,
    gamma: float,
    mode: Mode = "uniform",
    credit: Credit = "discount",
    kl_scale: float = 1.0,
    steps: int = 400,
    batch_size: int = 2048,
    learning_rate: float = 0.05,
    steps_per_refill: int = 20,
    seed: int = 0,
) -> None:
    """Off-policy SQDF with Adam. Every state is used with z and -z, which makes the gradient much less noisy."""
    world = policy.world
    schedule, elements = world.schedule, policy.weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    refill = 4 * batch_size // len(schedule)
    buffer = ReplayBuffer(4 * refill, schedule.trainable, mode, gamma)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % steps_per_refill == 0:
            x0, states = trajectories(policy, refill, elements, generator)
            buffer.add(states, [""] * refill, world.reward(x0))
        drawn = buffer.draw(batch_size // 2, generator)
        x, index = drawn.x.repeat(2, 1), drawn.index.repeat(2)
        z = torch.randn(drawn.x.shape, dtype=x.dtype, generator=generator)
        result = sqdf_loss(
            x,
            policy(x, index),
            world.network(x, schedule.timesteps[index]),
            schedule,
            index,
            lambda x_prev, index=index: world.reward(look_ahead(x_prev, index, schedule.tweedie(), world.network)),
            alpha=alpha,
            gamma=gamma,
            noise=torch.cat([z, -z]),
            kl_scale=kl_scale,
            credit=credit,
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        decay.step()


# Gaussian problem: p' = N(0, I), r = offset - 1/2 sum_d (x_d - c_d)^2.


def gaussian_world(schedule: DenoisingSchedule, target: Tensor, offset: float = 0.0) -> World:
    """Data N(0, 1) in each element; target c [D]."""
    one = torch.ones(1, dtype=torch.float64)
    return World(schedule, 0 * one, one, one, lambda x: offset - 0.5 * (x - target).square().sum(1))


def learned_moments(policy: Policy) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of x_0 under an affine policy, exactly."""
    schedule = policy.world.schedule
    slope, shift = policy.weight.detach().unbind(-1)
    p, q, sigma = schedule.transition.unbind(1)
    mean, variance = torch.zeros_like(shift[0]), torch.ones_like(shift[0])
    for i in range(len(schedule)):
        gain = p[i] + q[i] * (schedule.levels[i, 1] + slope[i])
        mean, variance = gain * mean + q[i] * shift[i], gain**2 * variance + sigma[i] ** 2
    return mean, variance.sqrt()


def predicted_moments(
    schedule: DenoisingSchedule, target: Tensor, weight: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Moments at the stationary point of the loss: transition mean (rho x + g L c) / (1 + g L^2), g = w sigma^2 / beta.

    Args:
        weight: credit w of each index, [T].
    """
    p, q, sigma = schedule.transition.unbind(1)
    rho = p + q * schedule.levels[:, 1]
    signal = torch.cat([schedule.lookahead_levels[:-1, 0], torch.ones(1, dtype=torch.float64)])
    g = torch.where(schedule.trainable, weight * sigma**2 / beta, 0.0)
    mean, variance = torch.zeros_like(target), torch.ones_like(target)
    for i in range(len(schedule)):
        shrink = 1 + g[i] * signal[i] ** 2
        mean = (rho[i] * mean + g[i] * signal[i] * target) / shrink
        variance = (rho[i] / shrink) ** 2 * variance + sigma[i] ** 2
    return mean, variance.sqrt()


def exact_moments(schedule: DenoisingSchedule, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Moments at the optimum of E[r(x_0)] - alpha sum KL with these sigmas: backward recursion of a quadratic value."""
    p, q, sigma = schedule.transition.unbind(1)
    rho = p + q * schedule.levels[:, 1]
    curvature, center, gains = torch.ones((), dtype=torch.float64), target, []
    for i in reversed(range(len(schedule))):
        stiffness = beta / sigma[i] ** 2
        total = curvature + stiffness
        gains.append((stiffness * rho[i] / total, curvature * center / total))
        curvature, center = curvature * stiffness / total * rho[i] ** 2, center / rho[i]
    mean, variance = torch.zeros_like(target), torch.ones_like(target)
    for i, (slope, shift) in enumerate(reversed(gains)):
        mean, variance = slope * mean + shift, slope**2 * variance + sigma[i] ** 2
    return mean, variance.sqrt()


# Mixture problem: one element, densities and per-state minimizers on a grid.

GRID = torch.linspace(-5, 5, 1001, dtype=torch.float64)
SPACING = GRID[1] - GRID[0]
CANDIDATES = torch.linspace(-6, 6, 1201, dtype=torch.float64)


def mixture_world(schedule: DenoisingSchedule) -> World:
    """Two modes of different weight and width, and a reward that saturates."""
    parameters = torch.tensor([[-1.2, 0.5, 0.6], [1.0, 0.35, 0.4]], dtype=torch.float64)
    means, stds, weights = parameters.unbind(1)
    return World(schedule, means, stds, weights, lambda x: (1.5 * x).tanh().sum(1))


def chain_density(schedule: DenoisingSchedule, means: list[Tensor]) -> Tensor:
    """Density of x_0 on GRID after a chain with transition means means[i] at the states GRID."""
    density = normalized(torch.exp(-0.5 * GRID**2))
    for mean, sigma in zip(means, schedule.transition[:, 2], strict=True):
        kernel = torch.exp(-0.5 * ((GRID[:, None] - mean) / sigma) ** 2)
        density = normalized(kernel @ (density / kernel.sum(0).clamp(min=1e-300)))
    return density


@torch.no_grad()
def policy_means(policy: Policy) -> list[Tensor]:
    """Transition means of a policy at the states GRID."""
    schedule, x = policy.world.schedule, GRID[:, None]
    means = []
    for i in range(len(schedule)):
        index = torch.full(GRID.shape, i)
        means.append(posterior_mean(x, policy(x, index), schedule.transition[:, :2], index)[:, 0])
    return means


@torch.no_grad()
def minimizing_means(world: World, *, gamma: float, beta: float) -> list[Tensor]:
    """Transition means that minimize SQDF's loss at each state of GRID:

    -gamma^k E_z[r(x0_hat(mu + sigma z))] + beta / 2 ((mu - mu_ref) / sigma)^2.
    """
    schedule, lookahead = world.schedule, world.schedule.tweedie()
    weight = credit_weight(schedule, torch.arange(len(schedule)), gamma=gamma)
    means = policy_means(Policy(world, affine, 1))
    for i in schedule.trainable.nonzero().flatten().tolist():

        def value(x: Tensor, i: int = i) -> Tensor:
            x0_hat = look_ahead(x[:, None], torch.full(x.shape, i), lookahead, world.network)
            return weight[i] * world.reward(x0_hat)

        means[i], _ = maximize(value, means[i], schedule.transition[i, 2], beta)
    return means


@torch.no_grad()
def optimal_means(world: World, *, beta: float) -> list[Tensor]:
    """Transition means that maximize E[r(x_0)] - alpha sum KL with these sigmas: dynamic programming."""
    schedule = world.schedule
    means = policy_means(Policy(world, affine, 1))
    value = world.reward(GRID[:, None])
    for i in reversed(range(len(schedule))):

        def later(x: Tensor, value: Tensor = value) -> Tensor:
            position = ((x - GRID[0]) / SPACING).clamp(0, len(GRID) - 1.001)
            left = position.long()
            return value[left].lerp(value[left + 1], position - left)

        means[i], value = maximize(later, means[i], schedule.transition[i, 2], beta)
    return means


def maximize(value: Callable[[Tensor], Tensor], reference: Tensor, sigma: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """argmax and max [n] over mu of E_z[value(mu + sigma z)] - beta / 2 ((mu - reference) / sigma)^2."""
    nodes, weights = gauss_hermite(40)
    points = CANDIDATES[:, None] + sigma * nodes
    expected = value(points.flatten()).view(points.shape) @ weights
    total = expected - 0.5 * beta * ((CANDIDATES - reference[:, None]) / sigma) ** 2
    best = total.argmax(1).clamp(1, len(CANDIDATES) - 2)
    left, middle, right = (total.gather(1, (best + k)[:, None])[:, 0] for k in (-1, 0, 1))
    # the vertex of the parabola through the best candidate and its neighbours
    step = 0.5 * (left - right) / (left - 2 * middle + right)
    spacing = CANDIDATES[1] - CANDIDATES[0]
    return CANDIDATES[best] + step * spacing, middle - 0.25 * (left - right) * step


def gauss_hermite(number: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E_z[f(z)], z ~ N(0, 1), from the eigenvalues of the Jacobi matrix."""
    off = torch.arange(1, number, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def tilted_density(world: World, beta: float) -> Tensor:
    """p'(x_0) exp(r(x_0) / beta) on GRID, normalized; beta = inf gives the data."""
    x = GRID[:, None]
    data = (world.weights / world.stds * torch.exp(-0.5 * ((x - world.means) / world.stds) ** 2)).sum(1)
    return normalized(data * torch.exp(world.reward(x) / beta))


def normalized(density: Tensor) -> Tensor:
    """The density, scaled to integrate to 1 on GRID."""
    return density / (density.sum() * SPACING)


def total_variation(first: Tensor, second: Tensor) -> float:
    """1/2 int |p - q| on GRID."""
    return float(0.5 * (first - second).abs().sum() * SPACING)


# The page.


def stable_diffusion_schedule(steps: int, trainable_ratio: float = TRAINABLE_RATIO) -> DenoisingSchedule:
    """DDIM with eta = 1 on Stable Diffusion 1.5's noise levels."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DenoisingSchedule.from_scheduler(scheduler, steps, trainable_ratio=trainable_ratio)


def buffer_rows() -> list[str]:
    """Relative deviation from the stationary point in the Gaussian problem, for every buffer mode."""
    schedule, target, beta = stable_diffusion_schedule(10), torch.tensor([2.0, -1.0]).double(), 1.0
    rows = []
    for gamma in (0.9, 1.0):
        weight = credit_weight(schedule, torch.arange(len(schedule)), gamma=gamma)
        expected = predicted_moments(schedule, target, weight, beta)
        for mode in ("uniform", "prioritised", "on-policy"):
            policy = Policy(gaussian_world(schedule, target, offset=4.0), affine, 2)
            train(policy, alpha=beta, gamma=gamma, mode=mode)
            mean, std = (
                ((found - right) / right).abs().max().item()
                for found, right in zip(learned_moments(policy), expected, strict=True)
            )
            rows.append(f"| {gamma:g} | {mode} | {mean:.0e} | {std:.0e} |")
    return rows


def gaussian_rows() -> list[str]:
    """Mean and variance of x_0 in the Gaussian problem with 50 trained steps, c = 2, beta = 1."""
    schedule, target, beta = stable_diffusion_schedule(50, math.inf), torch.tensor([2.0]).double(), 1.0
    rows = [
        "| tilted density | | 1.000 / 0.500 |",
        f"| exact optimum of the 50 steps | | {cell(exact_moments(schedule, target, beta))} |",
    ]
    settings: list[tuple[str, float, Credit]] = [
        ("gamma = 1", 1.0, "discount"),
        ("gamma = 0.9", 0.9, "discount"),
        ("credit = posterior", 1.0, "posterior"),
    ]
    for name, gamma, credit in settings:
        policy = Policy(gaussian_world(schedule, target), affine, 1)
        train(policy, alpha=beta / 2, gamma=gamma, credit=credit, steps=600, batch_size=4096)
        weight = credit_weight(schedule, torch.arange(len(schedule)), credit, gamma=gamma, beta=beta)
        trained, stationary = learned_moments(policy), predicted_moments(schedule, target, weight, beta)
        rows.append(f"| SQDF, {name} | {cell(trained)} | {cell(stationary)} |")
    fine = stable_diffusion_schedule(200, math.inf)
    weight = credit_weight(fine, torch.arange(len(fine)), "posterior", beta=beta)
    rows.append(f"| exact optimum of 200 steps | | {cell(exact_moments(fine, target, beta))} |")
    rows.append(f"| SQDF, credit = posterior, 200 steps | | {cell(predicted_moments(fine, target, weight, beta))} |")
    return rows


def cell(moments: tuple[Tensor, Tensor]) -> str:
    """Mean and variance of one element, from mean and standard deviation."""
    mean, std = moments
    return f"{mean.item():.3f} / {std.item() ** 2:.3f}"


def mixture_rows() -> list[str]:
    """Total variation between the trained chain and each comparison in the mixture problem with 8 steps."""
    schedule, rows = stable_diffusion_schedule(8), []
    world = mixture_world(schedule)
    for beta in (0.5, 0.25):
        optimum = chain_density(schedule, optimal_means(world, beta=beta))
        tilted = tilted_density(world, beta)
        for gamma in (1.0, 0.9):
            policy = mixture_policy(world)
            train(policy, alpha=beta / 2, gamma=gamma)
            trained = chain_density(schedule, policy_means(policy))
            best = chain_density(schedule, minimizing_means(world, gamma=gamma, beta=beta))
            distances = [f"{total_variation(trained, other):.3f}" for other in (best, optimum, tilted)]
            rows.append(f"| {beta:g} | {gamma:g} | {' | '.join(distances)} |")
    start = chain_density(schedule, policy_means(Policy(world, affine, 1)))
    distance = total_variation(start, tilted_density(world, math.inf))
    rows.append(f"\nThe untrained chain of 8 steps is {distance:.3f} from the data.")
    return rows


def mixture_policy(world: World) -> Policy:
    """A piecewise linear function of the state for each index."""
    return Policy(world, hats(torch.linspace(-4, 4, 65, dtype=torch.float64)), 1)


PAGE = """# Closed form

Two small problems with a known answer, trained in float64 with the functions of a real run: schedule, kernels, loss
and replay buffer. Written by `python examples/closed_form.py --output docs/closed_form.md`. The tests require
"trained" to be within 0.5 % of "closed form" and within 0.02 of the minimizers.

SQDF converges neither to the tilted density p' exp(r / beta) nor to the optimum of the problem with its number of
steps: the look-ahead approximates the soft value, and the discount is a choice. It converges to the minimizer of its
loss at every state. The tables show how far apart these are.

## Gaussian problem

Data N(0, I), r = -1/2 sum (x - c)^2, DDIM with eta = 1 on Stable Diffusion 1.5's noise levels. With rho = p + q
sqrt(1 - A), L = sqrt(A_prev) (1 at the last index), g = w sigma^2 / beta and beta = 2 alpha kl_scale / D, the
stationary transition mean is (rho x + g L c) / (1 + g L^2) at every state, whatever the buffer contains.

10 steps, c = (2, -1), beta = 1; largest relative deviation of the trained policy:

| gamma | buffer | mean of x_0 | std of x_0 |
|---|---|---|---|
{buffer}

50 steps, all trainable, c = 2, beta = 1; mean / variance of x_0:

| | trained | closed form |
|---|---|---|
{gaussian}

Here the exact soft value is r(x0_hat) / (1 + (1 - A_prev) / beta) up to a constant. `credit="posterior"` uses this
weight: it is exact in this problem, a heuristic elsewhere, and has no discount to tune.

## Mixture problem

Two modes, r = tanh(1.5 x), 8 steps, one element, and a policy that is piecewise linear in the state. Total variation
between the final density of the trained chain and, in turn, the chain of per-state minimizers of the loss, the
optimum of the problem with these 8 steps (dynamic programming), and the tilted density:

| beta | gamma | minimizers | optimum with 8 steps | tilted |
|---|---|---|---|---|
{mixture}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the page here instead of printing it")
    output = parser.parse_args().output
    parts = {"buffer": buffer_rows(), "gaussian": gaussian_rows(), "mixture": mixture_rows()}
    page = PAGE.format(**{name: "\n".join(rows) for name, rows in parts.items()})
    if output is None:
        print(page)
    else:
        output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
