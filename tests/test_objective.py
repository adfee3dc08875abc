"""The objective against the paper's equations, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sqdf_fast.errors import UserError
from sqdf_fast.objective import credit_weight, credited_loss, look_ahead, sqdf_loss, temperature
from sqdf_fast.schedule import DenoisingSchedule

SHAPE = (4, 3, 3)


def make_schedule(steps=6, **config):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        **{"steps_offset": 1, **config},
    )
    return DenoisingSchedule.from_scheduler(scheduler, steps)


def make_batch(batch=4, seed=0):
    """x, policy and reference outputs under guidance, noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows):
        return torch.randn(rows, *SHAPE, generator=generator, dtype=torch.float64)

    reference = normal(2 * batch)
    return normal(batch), reference + 0.1 * normal(2 * batch), reference, normal(batch)


def brightness(x):
    """A reward with a curved gradient, [B]."""
    return x.tanh().flatten(1).mean(1)


def test_temperature():
    assert temperature(2.0, 1.0, 16384) == 4 / 16384
    assert temperature(2.0, 0.5, 4) == 0.5


def test_discount():
    weight = credit_weight(make_schedule(5), torch.tensor([[0, 4], [3, 1]]), gamma=0.5)
    assert weight.dtype == torch.float64
    assert weight.tolist() == [[1 / 16, 1], [1 / 2, 1 / 8]]


def test_posterior_credit_is_the_gradient_of_the_exact_soft_value():
    """beta log E[exp(r(x_0) / beta) | x_prev] by quadrature, data N(0, 1), r = -1/2 (x_0 - c)^2."""
    schedule, beta, target = make_schedule(8), 0.3, 2.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights)
    for i in range(7):
        signal, noise = schedule.lookahead_levels[i]
        x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        samples = signal * x + noise * nodes  # x_0 given x_prev
        exponent = -0.5 * (samples - target) ** 2 / beta
        soft_value = beta * torch.logsumexp(exponent + weights.log(), 0)
        (exact,) = torch.autograd.grad(soft_value, x)
        (plain,) = torch.autograd.grad(-0.5 * (signal * x - target) ** 2, x)
        weight = credit_weight(schedule, torch.tensor(i), "posterior", beta=beta)
        assert exact.item() == pytest.approx((weight * plain).item(), rel=1e-6)


def test_posterior_credit_at_the_ends():
    schedule = make_schedule(8)
    index = torch.tensor([0, 6, 7])
    first, late, last = credit_weight(schedule, index, "posterior", beta=0.01).tolist()
    assert 0 < first < late < last == 1
    assert credit_weight(schedule, index, "posterior", beta=0.0).tolist() == [0, 0, 1]
    flow = DenoisingSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(), 4)
    s = flow.lookahead_levels[1, 1].item()
    variance = s**2 / ((1 - s) ** 2 + s**2)
    weight = credit_weight(flow, torch.tensor(1), "posterior", beta=0.5)
    assert weight.item() == pytest.approx(1 / (1 + variance / 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "uniform"}, "credit='uniform'"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": 1.01}, "gamma=1.01"),
        ({"credit": "posterior", "beta": -1.0}, "beta=-1.0"),
        ({"credit": "posterior", "beta": math.nan}, "beta=nan"),
    ],
)
def test_bad_credit(settings, message):
    with pytest.raises(UserError, match=message):
        credit_weight(make_schedule(), torch.tensor([0]), **settings)


def test_look_ahead_calls_the_network_at_each_timestep():
    """Two deterministic sub-steps of a network m = t x, written out; the last index is left alone."""
    schedule = make_schedule()
    lookahead = schedule.deterministic(2)
    x_prev = make_batch()[0].requires_grad_()
    index = torch.tensor([0, 5, 3, 1])

    def network(x, t):
        return (t / 1000).view(-1, 1, 1, 1) * x

    x0 = look_ahead(x_prev, index, lookahead, network)
    for b, i in enumerate(index.tolist()):
        factor = 1.0
        for j in range(2):
            row, column = lookahead.rows[i, j].tolist()
            factor *= row + column * lookahead.timesteps[i, j].item() / 1000
        torch.testing.assert_close(x0[b], factor * x_prev[b])
        (grad,) = torch.autograd.grad(x0[b].sum(), x_prev, retain_graph=True)
        torch.testing.assert_close(grad[b], torch.full(SHAPE, factor, dtype=torch.float64))
    assert torch.equal(x0[1], x_prev[1])


def test_look_ahead_never_reads_what_the_last_index_gets():
    lookahead = make_schedule().consistency()
    x_prev = make_batch()[0].requires_grad_()
    x0 = look_ahead(x_prev, torch.full((4,), 5), lookahead, lambda x, t: torch.full_like(x, torch.nan))
    assert torch.equal(x0, x_prev)
    (grad,) = torch.autograd.grad(x0.sum(), x_prev)
    assert torch.equal(grad, torch.ones_like(x_prev))


def test_look_ahead_with_guidance():
    schedule = make_schedule()
    x_prev, index = make_batch()[0], torch.tensor([0, 1, 2, 3])
    a, b = (c.view(-1, 1, 1, 1) for c in schedule.lookahead[index].unbind(1))
    x0 = look_ahead(x_prev, index, schedule.tweedie(), lambda x, t: torch.cat([x.sin(), x.cos()]), guidance_scale=3.0)
    torch.testing.assert_close(x0, a * x_prev + b * (x_prev.sin() + 3 * (x_prev.cos() - x_prev.sin())))


def transcribed_loss(x, policy, reference, schedule, index, noise, reward, *, g, gamma, alpha, kl_scale):
    """mean_b [-gamma^k r + alpha KL], a sample at a time."""
    terms = []
    for b, i in enumerate(index.tolist()):
        p, q, sigma = schedule.transition[i]
        m = policy[b] + g * (policy[len(x) + b] - policy[b])
        m_ref = reference[b] + g * (reference[len(x) + b] - reference[b])
        x_prev = p * x[b] + q * m + sigma * noise[b]
        kl = kl_scale * ((q * m - q * m_ref) ** 2 / sigma**2).mean()
        remaining = len(schedule) - 1 - i
        terms.append(-(gamma**remaining) * reward(x_prev[None], torch.tensor([i])) + alpha * kl)
    return torch.cat(terms).mean()


@pytest.mark.parametrize("ahead", [False, True])
def test_loss_and_gradient(ahead):
    schedule = make_schedule()
    x, policy, reference, noise = make_batch()
    policy.requires_grad_()
    index = torch.tensor([0, 5, 3, 1])

    def reward(x_prev, index):
        if ahead:
            x_prev = look_ahead(x_prev, index, schedule.tweedie(), lambda x, t: x.sin())
        return brightness(x_prev)

    settings = {"gamma": 0.9, "alpha": 2.0, "kl_scale": 0.5}
    result = sqdf_loss(
        x,
        policy,
        reference,
        schedule,
        index,
        lambda x_prev: reward(x_prev, index),
        guidance_scale=5.0,
        noise=noise,
        **settings,
    )
    expected = transcribed_loss(x, policy, reference, schedule, index, noise, reward, g=5.0, **settings)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, policy),
        torch.autograd.grad(expected, policy),
        rtol=1e-11,
        atol=1e-15,
    )
    torch.testing.assert_close(result.reward, reward(result.x_prev, index), rtol=1e-12, atol=0)
    assert not any(t.requires_grad for t in (result.reward, result.kl, result.x_prev))


@pytest.mark.parametrize("credit", ["discount", "posterior"])
@pytest.mark.parametrize("mask", [False, True])
def test_micro_batches_add_up(credit, mask):
    schedule = make_schedule()
    x, policy, reference, noise = make_batch(5)
    policy.requires_grad_()
    index = torch.tensor([0, 5, 3, 1, 2])

    def loss(rows, denominator):
        halves = torch.cat([rows, rows + 5])
        return sqdf_loss(
            x[rows],
            policy[halves],
            reference[halves],
            schedule,
            index[rows],
            brightness,
            alpha=2.0,
            gamma=0.9,
            guidance_scale=5.0,
            noise=noise[rows],
            credit=credit,
            mask_nonpositive=mask,
            denominator=denominator,
        ).loss

    whole = loss(torch.arange(5), None)
    parts = loss(torch.arange(2), 5) + loss(torch.arange(2, 5), 5)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(parts, policy), torch.autograd.grad(whole, policy), rtol=1e-12, atol=1e-16
    )


def test_credited_loss_with_posterior_credit():
    schedule, index = make_schedule(), torch.tensor([[0, 5, 3], [2, 2, 1]])
    reward = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    kl = torch.linspace(0.1, 0.2, 6, dtype=torch.float64).view(2, 3)
    loss = credited_loss(reward, kl, schedule, index, alpha=2.0, gamma=0.9, beta=0.2, credit="posterior")
    weight = credit_weight(schedule, index, "posterior", beta=0.2)
    torch.testing.assert_close(loss, (-weight * reward + 2 * kl).mean())
    loss.backward()
    torch.testing.assert_close(reward.grad, -weight / 6)


def test_one_step_without_discount_is_draft_1_with_kl():
    """T = 1, trailing, gamma = 1: the gradient of r(x_0) - alpha KL through the one step that makes x_0."""
    schedule = make_schedule(1, timestep_spacing="trailing", steps_offset=0)
    x, policy, reference, noise = make_batch()
    policy.requires_grad_()
    index = torch.zeros(4, dtype=torch.int64)

    def score(x_prev):
        unread = torch.full_like(x_prev, torch.nan)
        return brightness(look_ahead(x_prev, index, schedule.consistency(), lambda x, t: unread))

    loss = sqdf_loss(x, policy, reference, schedule, index, score, alpha=0.1, guidance_scale=5.0, noise=noise).loss
    p, q, sigma = schedule.transition[0]
    m = policy[:4] + 5 * (policy[4:] - policy[:4])
    m_ref = reference[:4] + 5 * (reference[4:] - reference[:4])
    kl = ((q / sigma * (m - m_ref)) ** 2).flatten(1).mean(1)
    draft = (-brightness(p * x + q * m + sigma * noise) + 0.1 * kl).mean()
    torch.testing.assert_close(loss, draft, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, policy), torch.autograd.grad(draft, policy), rtol=1e-10, atol=1e-14
    )


def test_equal_policy_and_reference():
    """KL exactly 0, and the whole gradient is the reward's."""
    schedule = make_schedule()
    x, policy, _, noise = make_batch()
    policy.requires_grad_()
    settings = {"guidance_scale": 5.0, "noise": noise}
    arguments = (x, policy, policy.detach(), schedule, torch.tensor([0, 5, 3, 1]), brightness)
    with_kl = sqdf_loss(*arguments, alpha=1e6, **settings)
    without = sqdf_loss(*arguments, alpha=0.0, **settings)
    assert with_kl.kl.tolist() == [0, 0, 0, 0]
    assert torch.equal(torch.autograd.grad(with_kl.loss, policy)[0], torch.autograd.grad(without.loss, policy)[0])


def test_float32_latents_take_float32_tables():
    schedule = make_schedule()
    x, policy, reference, noise = (t.float() for t in make_batch())
    index = torch.tensor([0, 5, 3, 1])
    result = sqdf_loss(x, policy, reference, schedule, index, brightness, alpha=2.0, guidance_scale=5.0, noise=noise)
    assert result.loss.dtype == result.kl.dtype == result.x_prev.dtype == torch.float32
    exact = sqdf_loss(
        *(t.double() for t in (x, policy, reference)),
        schedule,
        index,
        brightness,
        alpha=2.0,
        guidance_scale=5.0,
        noise=noise.double(),
    )
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)


def test_reward_of_the_wrong_shape():
    x, policy, reference, noise = make_batch()
    with pytest.raises(UserError, match=r"shape \(4, 1\); one number a sample, \[4\]"):
        sqdf_loss(
            x,
            policy,
            reference,
            make_schedule(),
            torch.zeros(4, dtype=torch.int64),
            lambda x_prev: brightness(x_prev)[:, None],
            alpha=1.0,
            guidance_scale=5.0,
            noise=noise,
        )
