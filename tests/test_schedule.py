"""The coefficients against the diffusers schedulers they are read from."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from sqdf_fast.errors import UserError
from sqdf_fast.schedule import DenoisingSchedule, consistency_rows

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def in_float64(scheduler):
    """The scheduler with its tables in float64, so that its own steps are exact."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def ddim(**config):
    return in_float64(DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, **config}))


def latents(number, seed=0):
    """`number` tensors [2, 4, 3, 3] in float64."""
    return torch.randn(number, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("steps", "eta", "to_one"), [(4, 1.0, False), (7, 0.4, True), (50, 1.0, True)])
def test_ddim_step(spacing, prediction, steps, eta, to_one):
    scheduler = ddim(timestep_spacing=spacing, prediction_type=prediction, set_alpha_to_one=to_one)
    schedule = DenoisingSchedule.from_scheduler(scheduler, steps, eta)
    scheduler.set_timesteps(steps)
    x, m, z = latents(3)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(m, t, x, eta=eta, variance_noise=z)
        p, q, sigma = schedule.transition[i]
        a, b = schedule.posterior[i]
        torch.testing.assert_close(p * x + q * m + sigma * z, expected.prev_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a * x + b * m, expected.pred_original_sample, rtol=1e-10, atol=1e-10)
        deterministic = scheduler.step(m, t, x, eta=0.0).prev_sample
        p, q = schedule.ode[i]
        torch.testing.assert_close(p * x + q * m, deterministic, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps", [3, 20])
def test_ddpm_step(spacing, prediction, variance, steps):
    scheduler = in_float64(
        DDPMScheduler(clip_sample=False, timestep_spacing=spacing, prediction_type=prediction, variance_type=variance)
    )
    schedule = DenoisingSchedule.from_scheduler(scheduler, steps)
    scheduler.set_timesteps(steps)
    x, m = latents(2)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i))
        z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        p, q, sigma = schedule.transition[i]
        a, b = schedule.posterior[i]
        torch.testing.assert_close(p * x + q * m + sigma * z, expected.prev_sample, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a * x + b * m, expected.pred_original_sample, rtol=1e-10, atol=1e-10)


def test_ddpm_custom_timesteps():
    scheduler = in_float64(DDPMScheduler(clip_sample=False))
    schedule = DenoisingSchedule.from_scheduler(scheduler, None, timesteps=[900, 500, 499, 3])
    assert schedule.timesteps.tolist() == [900, 500, 499, 3]
    assert schedule.lookahead_timesteps.tolist() == [500, 499, 3, 0]


def flow_coefficients(sigmas, eta):
    """Flow-GRPO's SDE step with std = sqrt(s / (1 - s)) eta, where the next level stands in for s = 1."""
    rows = []
    for s, s_next in itertools.pairwise(sigmas):
        std = (s / (1 - (sigmas[1] if s == 1 else s))) ** 0.5 * eta
        dt = s_next - s
        rows.append(
            [1 + std**2 / (2 * s) * dt, (1 + std**2 * (1 - s) / (2 * s)) * dt, std * (-dt) ** 0.5],
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (4, 0.7), (28, 0.3)])
def test_flow_step(shift, steps, eta):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = DenoisingSchedule.from_scheduler(scheduler, steps, eta)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().tolist()
    assert sigmas[0] == 1
    torch.testing.assert_close(schedule.transition, flow_coefficients(sigmas, eta), rtol=1e-12, atol=0)
    assert torch.isfinite(schedule.transition).all()
    assert schedule.timesteps.tolist() == scheduler.timesteps.double().tolist()
    assert schedule.lookahead_levels[:, 1].tolist() == sigmas[1:]


def test_flow_without_noise_is_the_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = DenoisingSchedule.from_scheduler(scheduler, 10, 1e-3)
    scheduler.set_timesteps(10)
    x, m = latents(2).float()
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(m, t, x).prev_sample
        p, q, sigma = schedule.transition[i].float()
        assert sigma <= 1e-3 * 2
        torch.testing.assert_close(p * x + q * m, expected, rtol=1e-5, atol=1e-5)
        p, q = schedule.ode[i].float()
        torch.testing.assert_close(p * x + q * m, expected, rtol=1e-6, atol=1e-6)


def test_flow_sde_keeps_the_marginals():
    """On data N(0, 1) with the exact velocity, small steps keep the variance (1 - s)^2 + s^2 of a level."""
    schedule = DenoisingSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(), 1000, 0.7)
    s = schedule.levels[:, 1]
    velocity = (2 * s - 1) / ((1 - s) ** 2 + s**2)  # E[epsilon - x_0 | x] = velocity x
    p, q, sigma = schedule.transition.unbind(1)
    variance = torch.ones((), dtype=torch.float64)
    for i in range(len(schedule)):
        variance = (p[i] + q[i] * velocity[i]) ** 2 * variance + sigma[i] ** 2
        expected = schedule.lookahead_levels[i].square().sum()
        # near s = 1 the diffusion term is too large for steps of 1/1000
        assert abs(variance - expected) < (0.1 if i < 500 else 0.01) * expected


def test_flow_with_mu():
    """FLUX shifts its levels by a mu that depends on the resolution."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule = DenoisingSchedule.from_scheduler(scheduler, 5, mu=0.8)
    scheduler.set_timesteps(5, mu=0.8)
    assert schedule.levels[:, 1].tolist() == scheduler.sigmas[:-1].double().tolist()
    with pytest.raises(UserError, match="mu"):
        DenoisingSchedule.from_scheduler(scheduler, 5)


def test_the_step_ends_where_the_scheduler_says():
    """linspace, T = 4: DDIM steps 250 down from timesteps that are 333 apart, to 83 above the next one."""
    scheduler = ddim(timestep_spacing="linspace")
    schedule = DenoisingSchedule.from_scheduler(scheduler, 4)
    assert schedule.timesteps.tolist() == [999, 666, 333, 0]
    assert schedule.lookahead_timesteps.tolist() == [749, 416, 83, 0]
    alphas = scheduler.alphas_cumprod[[749, 416, 83]]
    torch.testing.assert_close(schedule.lookahead_levels[:3, 0], alphas.sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.lookahead[:3, 0], 1 / alphas.sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.lookahead[:3, 1], -((1 - alphas) / alphas).sqrt(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tweedie_is_the_schedulers_denoised_sample(prediction):
    """With leading spacing a step ends at the next timestep, where the scheduler itself gives x0_hat."""
    scheduler = ddim(prediction_type=prediction, steps_offset=1)
    schedule = DenoisingSchedule.from_scheduler(scheduler, 50)
    lookahead = schedule.tweedie()
    scheduler.set_timesteps(50)
    x, m = latents(2)
    assert lookahead.timesteps[:-1, 0].tolist() == scheduler.timesteps[1:].tolist()
    for i in range(49):
        a, b = lookahead.rows[i, 0]
        expected = scheduler.step(m, scheduler.timesteps[i + 1], x).pred_original_sample
        torch.testing.assert_close(a * x + b * m, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("snap", [None, 50])
def test_consistency_is_the_lcm_schedulers_denoised_sample(prediction, snap):
    schedule = DenoisingSchedule.from_scheduler(ddim(prediction_type=prediction, steps_offset=1), 50)
    lookahead = schedule.consistency(snap=snap)
    lcm = in_float64(LCMScheduler(prediction_type=prediction))
    x, m = latents(2)
    for i in range(49):
        t = int(lookahead.timesteps[i, 0])
        lcm.set_timesteps(timesteps=[t])
        expected = lcm.step(m, t, x).denoised
        a, b = lookahead.rows[i, 0]
        torch.testing.assert_close(a * x + b * m, expected, rtol=1e-10, atol=1e-10)


def test_consistency_grid():
    """The published code asks the consistency model at the nearest point of LCM's own grid."""
    schedule = DenoisingSchedule.from_scheduler(ddim(steps_offset=1), 50)
    lcm = LCMScheduler()
    lcm.set_timesteps(50)
    own = schedule.consistency().timesteps[:, 0]
    snapped = schedule.consistency(snap=50).timesteps[:, 0]
    assert own[:3].tolist() == [961, 941, 921]
    assert snapped[:3].tolist() == [959, 939, 919]
    assert own[48] == 1
    assert snapped[48] == 19
    for before, after in zip(own.tolist(), snapped.tolist(), strict=True):
        assert after == lcm.timesteps[(lcm.timesteps - before).abs().argmin()]
    for bad in (0, 1001):
        with pytest.raises(UserError, match="consistency grid"):
            schedule.consistency(snap=bad)
    flow = DenoisingSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(), 4)
    with pytest.raises(UserError, match="flow matching"):
        flow.consistency(snap=50)


def test_consistency_boundary():
    """At t = 0 a consistency model is the identity."""
    rows = consistency_rows(torch.tensor([[3.0, -2.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert rows.tolist() == [[1, 0]]


SCHEDULERS = [
    *(ddim(prediction_type=prediction) for prediction in PREDICTIONS),
    ddim(timestep_spacing="trailing", set_alpha_to_one=True),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [2, 4, 7, 50])
def test_consistency_sampling_is_the_lcm_schedulers(prediction, steps):
    config = {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction}
    scheduler = in_float64(LCMScheduler(**config))
    scheduler.set_timesteps(steps)
    schedule = DenoisingSchedule.consistency_sampling(ddim(prediction_type=prediction), steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    x, m = latents(2)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        expected = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        p, q, sigma = schedule.transition[i]
        torch.testing.assert_close(p * x + q * m + sigma * z, expected, rtol=1e-10, atol=1e-10)


def test_a_consistency_policy_looks_ahead_as_it_samples_next():
    """Without noise, the look-ahead from x_prev is what the next step would make of it."""
    schedule = DenoisingSchedule.consistency_sampling(ddim(), 4)
    lookahead = schedule.consistency()
    assert schedule.trainable.tolist() == [True, True, True, False]
    assert schedule.transition[-1, 2] == 0
    assert lookahead.timesteps[:-1, 0].tolist() == schedule.timesteps[1:].tolist()
    signal = schedule.levels[2:, :1]
    torch.testing.assert_close(signal * lookahead.rows[:2, 0], schedule.transition[1:3, :2], rtol=1e-12, atol=0)
    torch.testing.assert_close(lookahead.rows[2, 0], schedule.transition[3, :2], rtol=1e-12, atol=0)
    assert lookahead.rows[3, 0].tolist() == [1, 0]
    assert torch.equal(schedule.transition[:3, 2], schedule.levels[1:, 1])


def test_consistency_sampling_along_a_flow():
    """x_prev = (1 - s') x0_hat + s' z, with x0_hat = x - s m away from the boundary: FlowMatchLCMScheduler's step."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = DenoisingSchedule.consistency_sampling(scheduler, 4)
    scheduler.set_timesteps(4)
    s = scheduler.sigmas.double()
    expected = torch.stack([1 - s[1:], -(1 - s[1:]) * s[:-1], s[1:]], dim=1)
    torch.testing.assert_close(schedule.transition, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 51])
def test_a_consistency_policy_has_2_to_50_steps(steps):
    with pytest.raises(UserError, match=f"{steps} steps of a consistency model: 2 to 50"):
        DenoisingSchedule.consistency_sampling(ddim(), steps)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_deterministic_lookahead_follows_the_line(scheduler, n):
    """A network that knows x_0 and epsilon stays on signal x_0 + noise epsilon and ends at x_0."""
    schedule = DenoisingSchedule.from_scheduler(scheduler, 8)
    lookahead = schedule.deterministic(n)
    assert lookahead.calls == n
    x0, noise = latents(2)
    for i in range(7):
        x = schedule.lookahead_levels[i, 0] * x0 + schedule.lookahead_levels[i, 1] * noise
        for j in range(n):
            t = lookahead.timesteps[i, j]
            if schedule.prediction == "flow":
                level = torch.stack([1 - t / 1000, t / 1000])
            else:
                alpha = schedule.alphas_cumprod[int(t)]
                level = torch.stack([alpha.sqrt(), (1 - alpha).sqrt()])
            a, b = lookahead.rows[i, j]
            if b != 0:  # a row that does not read m makes no step
                torch.testing.assert_close(x, level[0] * x0 + level[1] * noise, rtol=1e-4, atol=1e-5)
            m = {
                "epsilon": noise,
                "sample": x0,
                "v_prediction": level[0] * noise - level[1] * x0,
                "flow": noise - x0,
            }[schedule.prediction]
            x = a * x + b * m
        torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-5)


def test_deterministic_lookahead_makes_the_schedulers_steps():
    """From t = 600 in three steps: the first two are DDIM's own with eta = 0 on 600, 400, 200."""
    scheduler = ddim()
    lookahead = DenoisingSchedule.from_scheduler(scheduler, 5).deterministic(3)
    scheduler.set_timesteps(5)
    assert lookahead.timesteps[0].tolist() == [600, 400, 200]
    x, m = latents(2)
    for j, t in enumerate([600, 400]):
        a, b = lookahead.rows[0, j]
        torch.testing.assert_close(a * x + b * m, scheduler.step(m, t, x).prev_sample)
    a, b = lookahead.rows[0, 2]
    torch.testing.assert_close(a * x + b * m, scheduler.step(m, 200, x).pred_original_sample)


def test_deterministic_lookahead_of_one_step_is_tweedie():
    schedule = DenoisingSchedule.from_scheduler(ddim(prediction_type="v_prediction"), 20)
    one, tweedie = schedule.deterministic(1), schedule.tweedie()
    torch.testing.assert_close(one.rows, tweedie.rows, rtol=1e-13, atol=1e-15)
    assert torch.equal(one.timesteps, tweedie.timesteps)
    with pytest.raises(UserError, match="n >= 1"):
        schedule.deterministic(0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_lookahead_after_the_last_step(scheduler):
    schedule = DenoisingSchedule.from_scheduler(scheduler, 6)
    assert schedule.lookahead[-1].tolist() == [1, 0]
    for lookahead in (schedule.tweedie(), schedule.consistency(), schedule.deterministic(3)):
        assert lookahead.rows[-1].tolist() == [[1, 0]] * lookahead.calls
        assert (lookahead.rows[:-2, :, 1] != 0).any(1).all()
        assert torch.isfinite(lookahead.rows).all()


@pytest.mark.parametrize(
    ("scheduler", "steps", "excluded"),
    [
        (ddim(steps_offset=1), 50, [48]),  # Stable Diffusion 1.5: a weight of 10.7 against 0.18 mid-schedule
        (ddim(steps_offset=1), 20, [18]),
        (ddim(set_alpha_to_one=True), 20, [18, 19]),  # 59 and infinite against 0.48
        (ddim(timestep_spacing="linspace"), 50, [48, 49]),
        (ddim(timestep_spacing="trailing"), 50, [49]),
        (ddim(timestep_spacing="trailing"), 1, []),
        (DDPMScheduler(clip_sample=False), 10, [8, 9]),  # 1170 and sigma = 1e-10 against 2.8
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 20, []),
    ],
)
def test_trainable(scheduler, steps, excluded):
    schedule = DenoisingSchedule.from_scheduler(scheduler, steps)
    assert (~schedule.trainable).nonzero().flatten().tolist() == excluded
    weight = (schedule.transition[:, 1] / schedule.transition[:, 2]) ** 2
    kept = schedule.kl_weight[schedule.trainable]
    assert torch.isfinite(kept).all()
    torch.testing.assert_close(kept, weight[schedule.trainable])


def test_trainable_ratio():
    scheduler = ddim(steps_offset=1)
    every = DenoisingSchedule.from_scheduler(scheduler, 50, trainable_ratio=float("inf"))
    assert every.trainable.all()
    assert every.kl_weight[48] == pytest.approx(10.72, abs=0.01)
    # a smaller ratio leaves weights up to the moderate 4 alone
    assert DenoisingSchedule.from_scheduler(scheduler, 50, trainable_ratio=0.1).trainable.sum() == 49


def test_remaining():
    schedule = DenoisingSchedule.from_scheduler(ddim(), 10)
    assert len(schedule) == 10
    assert schedule.remaining(torch.tensor([[0, 9], [4, 8]])).tolist() == [[9, 0], [5, 1]]


def test_zero_terminal_snr():
    """The noisiest level holds no signal: x0_hat is -m for v_prediction, and does not exist for epsilon."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = DenoisingSchedule.from_scheduler(ddim(prediction_type="v_prediction", **config), 10)
    assert schedule.posterior[0].tolist() == [0, -1]
    assert torch.isfinite(schedule.transition).all()
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        DenoisingSchedule.from_scheduler(ddim(**config), 10)


def test_tables_are_float64_and_copies_are_kept():
    schedule = DenoisingSchedule.from_scheduler(ddim(), 10)
    assert {t.dtype for t in (schedule.transition, schedule.posterior, schedule.timesteps)} == {torch.float64}
    copy = schedule.to("cpu")
    assert copy is schedule.to("cpu")
    assert copy is copy.to("cpu")
    assert copy.transition.dtype == torch.float32
    assert copy.trainable.dtype == torch.bool
    assert torch.equal(copy.transition, schedule.transition.float())
    # nothing passes through float32 on its way to another copy or look-ahead
    assert copy.to("cpu", torch.float64) is schedule
    assert torch.equal(copy.consistency().rows, schedule.consistency().rows)
    assert torch.equal(copy.deterministic(3).rows, schedule.deterministic(3).rows)
    moved = schedule.tweedie().to("cpu")
    assert moved.rows.dtype == moved.timesteps.dtype == torch.float32


def test_the_scheduler_is_left_as_it_was():
    scheduler = ddim()
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    DenoisingSchedule.from_scheduler(scheduler, 20)
    assert scheduler.num_inference_steps == 7
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (ddim(), {"num_inference_steps": 0}, "num_inference_steps=0"),
        (ddim(), {"num_inference_steps": None}, "num_inference_steps is None"),
        (ddim(), {"num_inference_steps": 1001}, "1001"),
        (ddim(steps_offset=1), {"num_inference_steps": 1000}, "timestep 1000"),
        (ddim(), {"eta": -0.1}, "eta=-0.1"),
        (ddim(), {"eta": float("nan")}, "eta=nan"),
        (ddim(), {"eta": 0.0}, "eta=0 with 10 steps leaves no index"),
        (ddim(), {"eta": 3.0}, "eta is at most about 1"),
        (ddim(), {"unknown": 1}, "set_timesteps"),
        (ddim(set_alpha_to_one=True, timestep_spacing="trailing"), {"num_inference_steps": 1}, "no index"),
        (ddim(clip_sample=True), {}, "clip_sample=True"),
        (ddim(thresholding=True), {}, "thresholding=True"),
        (DDPMScheduler(), {}, "clip_sample=True"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), {}, "learned_range"),
        (DDPMScheduler(clip_sample=False), {"eta": 0.5}, "DDPMScheduler has no eta"),
        (FlowMatchEulerDiscreteScheduler(), {"eta": 0.0}, "leaves no index"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, "stochastic_sampling=True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas=True"),
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler is not supported: allowed are DDIMScheduler"),
        (PNDMScheduler(), {}, "DDIMScheduler.from_config"),
    ],
)
def test_refusals_are_one_clear_line(scheduler, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        DenoisingSchedule.from_scheduler(scheduler, **{"num_inference_steps": 10, **arguments})
    assert "\n" not in str(caught.value)
