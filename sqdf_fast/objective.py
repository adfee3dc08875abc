"""The paper's equations on top of the kernels, and the loss that drops into a training script.

SQDF (Kang et al., arXiv 2512.04559) maximizes E[r(x_0) - alpha sum_t KL(p || p')] over the denoising
transitions p of a pretrained p'. The soft Q-function of a step is approximated by one look-ahead, and its
gradient is reparameterised:

    Q(x_t, x_{t-1})  ~  w r(x0_hat(x_{t-1})),     x_{t-1} = mu(x_t) + sigma z
    loss             =  mean_b [-w_b r_b + alpha KL_b],     w = gamma^k, k the steps that remain

The KL is the mean over the D elements of a sample without the Gaussian's factor 1/2 (kl_scale = 1), so that
the tilt that alpha asks for is exp(r / beta) with beta = 2 alpha kl_scale / D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import denoise_step, discounted_loss, posterior_mean
from sqdf_fast.schedule import DenoisingSchedule, Lookahead

Credit = Literal["discount", "posterior"]


def temperature(alpha: float, kl_scale: float, elements: int) -> float:
    """beta = 2 alpha kl_scale / D: the effective temperature of the tilted density p' exp(r / beta).

    Args:
        alpha: KL coefficient; kl_scale: factor of the KL; elements: D, elements of a sample.
    """
    return 2 * alpha * kl_scale / elements


def credit_weight(
    schedule: DenoisingSchedule,
    index: Tensor,
    credit: Credit = "discount",
    *,
    gamma: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """w, the share of the look-ahead's reward that the step at `index` is credited with.

    "discount": gamma^k, the paper's.
    "posterior": 1 / (1 + v / beta), v the variance of x_0 given x_{t-1} at unit data variance: 1 - A_prev, or
    s^2 / ((1 - s)^2 + s^2) for flow matching. The soft value of a quadratic reward on Gaussian data is
    exactly r(x0_hat) times this, up to a constant; elsewhere it is a heuristic, without a discount to tune.

    Args:
        schedule: of the sampler.
        index: [...] int64, positions in the schedule.
        gamma: discount in (0, 1], for "discount".
        beta: temperature, >= 0, for "posterior".

    Returns:
        float64, shaped like index; 1 at the last index.

    Raises:
        UserError: unknown credit, gamma or beta out of range.
    """
    if credit == "discount":
        if not 0 < gamma <= 1:
            raise UserError(f"gamma={gamma} is outside (0, 1]")
        return torch.pow(gamma, schedule.remaining(index).double())
    if credit != "posterior":
        raise UserError(f"credit={credit!r} is unknown: choose discount or posterior")
    if not beta >= 0:
        raise UserError(f"beta={beta} must be a number >= 0")
    signal, noise = schedule.to(index.device, torch.float64).lookahead_levels[index].square().unbind(-1)
    variance = noise / (signal + noise)
    exact = (index == len(schedule) - 1) | (variance == 0)
    return torch.where(exact, 1.0, beta / (beta + variance))


def look_ahead(
    x_prev: Tensor,
    index: Tensor,
    lookahead: Lookahead,
    network: Callable[[Tensor, Tensor], Tensor],
    *,
    guidance_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """x0_hat(x_prev): the look-ahead's network calls, each followed by its posterior mean.

    Args:
        x_prev: [B, ...]; index: [B] int64, the index that produced x_prev; both on the look-ahead's device.
        lookahead: from the schedule's `tweedie`, `consistency` or `deterministic`.
        network: (x [B, ...], timesteps [B]) -> output [2B, ...] ordered [uncond; cond], or [B, ...] if
            guidance_scale = 1.
        guidance_scale: of this network; a consistency model is called with 1.

    Returns:
        [B, ...]; x_prev itself where the index is the last.
    """
    estimate = x_prev
    for rows, timesteps in zip(lookahead.rows.unbind(1), lookahead.timesteps.unbind(1), strict=True):
        output = network(estimate, timesteps[index])
        estimate = posterior_mean(estimate, output, rows, index, guidance_scale=guidance_scale, impl=impl)
    return estimate


@dataclass(frozen=True)
class SqdfLoss:
    """The loss of a batch and what it is made of.

    Attributes:
        loss: scalar, call backward on it.
        reward, kl: [B] detached.
        x_prev: [B, ...] detached, the state that the policy stepped to.
    """

    loss: Tensor
    reward: Tensor
    kl: Tensor
    x_prev: Tensor


def sqdf_loss(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    schedule: DenoisingSchedule,
    index: Tensor,
    reward: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    gamma: float = 1.0,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    kl_scale: float = 1.0,
    credit: Credit = "discount",
    mask_nonpositive: bool = False,
    denominator: float | None = None,
    impl: str = "auto",
) -> SqdfLoss:
    """The SQDF loss of one denoising step, in one call.

    Args:
        x: [B, ...] latents x_t at the schedule's `index`, from any policy (a replay buffer, the current policy).
        policy: the policy's network output at x, [2B, ...] ordered [uncond; cond]; [B, ...] if guidance_scale = 1.
        reference: the frozen reference's, like `policy`; gets no gradient.
        schedule: of the sampler, on any device.
        index: [B] int64 on the device of x; draw trainable indices only.
        reward: x_prev [B, ...] -> r [B], differentiable: usually decode and score of `look_ahead(x_prev, index, ...)`.
        alpha: KL coefficient; gamma: discount in (0, 1].
        noise, seed: z shaped like x, or int64 [B]; exactly one.
        kl_scale, mask_nonpositive, denominator, impl: as in `denoise_step` and `discounted_loss`.
        credit: see `credit_weight`.

    Raises:
        UserError: arguments that do not fit, or a reward that is not [B].
    """
    tables = schedule.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    x_prev, kl = denoise_step(
        x,
        policy,
        reference,
        tables.transition,
        index,
        guidance_scale=guidance_scale,
        noise=noise,
        seed=seed,
        kl_scale=kl_scale,
        impl=impl,
    )
    score = reward(x_prev)
    if score.shape != index.shape:
        raise UserError(f"the reward returned shape {tuple(score.shape)}; one number a sample, [{len(x)}], is needed")
    beta = temperature(alpha, kl_scale, x[0].numel())
    loss = credited_loss(
        score,
        kl,
        schedule,
        index,
        alpha=alpha,
        gamma=gamma,
        beta=beta,
        credit=credit,
        mask_nonpositive=mask_nonpositive,
        denominator=denominator,
        impl=impl,
    )
    return SqdfLoss(loss, score.detach(), kl.detach(), x_prev.detach())


def credited_loss(
    reward: Tensor,
    kl: Tensor,
    schedule: DenoisingSchedule,
    index: Tensor,
    *,
    alpha: float,
    gamma: float = 1.0,
    beta: float = 0.0,
    credit: Credit = "discount",
    mask_nonpositive: bool = False,
    denominator: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`discounted_loss` with either credit: sum over the samples of -w r + alpha kl, over `denominator`.

    Args:
        reward, kl: [B] or [K, B]; index: int64, of that shape and on that device.
        beta: `temperature`, for credit "posterior"; the rest as in `discounted_loss`.
    """
    if credit == "posterior":
        reward = reward * credit_weight(schedule, index, credit, beta=beta).to(reward)
        gamma = 1.0
    return discounted_loss(
        reward,
        kl,
        schedule.remaining(index),
        gamma=gamma,
        alpha=alpha,
        mask_nonpositive=mask_nonpositive,
        denominator=denominator,
        impl=impl,
    )
