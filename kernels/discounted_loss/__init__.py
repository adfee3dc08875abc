"""The scalar that SQDF minimizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.discounted_loss import op as fused
from sqdf_fast.kernels.discounted_loss import reference as unfused
from sqdf_fast.kernels.discounted_loss.reference import Forward
from sqdf_fast.kernels.dispatch import resolve
from sqdf_fast.kernels.validation import math_dtype


def discounted_loss(
    reward: Tensor,
    kl: Tensor,
    remaining: Tensor,
    *,
    gamma: float,
    alpha: float,
    mask_nonpositive: bool = False,
    denominator: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """sum over the samples of -gamma^k r + alpha kl, over `denominator`. The KL is not discounted.

    SQDF (arXiv 2512.04559): the soft Q-function is approximated by the discounted reward of the look-ahead.

    Args:
        reward: r, [B], or [K, B] for K timesteps per sample; any float dtype.
        kl: shaped like reward.
        remaining: k, int64, shaped like reward: steps that follow the one taken, 0 for the last.
        gamma: discount in (0, 1].
        alpha: KL coefficient, >= 0.
        mask_nonpositive: samples with r <= 0 contribute neither reward nor KL (the published text-to-image
            program).
        denominator: divisor of the sum; None: the number of samples, masked ones included. Give the size of
            the whole batch to every micro-batch: their losses and gradients then add up to those of the batch.
        impl: "auto", "triton", "native" or "reference". A C++ version of so few numbers would gain nothing: on the CPU
            "native" is the reference.

    Returns:
        Scalar float32 (float64 when reward or kl is float64), differentiable with respect to reward and kl.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, gamma, alpha or denominator out of range, an
            `impl` that cannot run.
    """
    op = "discounted_loss"
    if not 0 < gamma <= 1:
        raise UserError(f"{op}: gamma={gamma} is outside (0, 1]")
    if not 0 <= alpha < math.inf:
        raise UserError(f"{op}: alpha={alpha} must be a number >= 0")
    if denominator is not None and not 0 < denominator < math.inf:
        raise UserError(f"{op}: denominator={denominator} must be a number > 0")
    if not reward.is_floating_point() or not kl.is_floating_point():
        raise UserError(f"{op}: reward is {reward.dtype}, kl {kl.dtype}; both must be floating point")
    if reward.ndim not in (1, 2) or reward.numel() == 0 or kl.shape != reward.shape or remaining.shape != reward.shape:
        raise UserError(
            f"{op}: reward {tuple(reward.shape)}, kl {tuple(kl.shape)}, remaining {tuple(remaining.shape)}: "
            "give one shape for all, [B] or [K, B], not empty"
        )
    if remaining.dtype != torch.int64 or not reward.device == kl.device == remaining.device:
        raise UserError(
            f"{op}: remaining is {remaining.dtype} on {remaining.device}; "
            f"it must be int64, and reward ({reward.device}) and kl ({kl.device}) on the same device"
        )
    if impl == "native" and reward.device.type == "cpu":
        impl = "reference"
    name = resolve(op, impl, reward.device, math_dtype(reward, kl))
    total = float(reward.numel() if denominator is None else denominator)
    given = Forward(reward, kl, remaining, float(gamma), float(alpha), bool(mask_nonpositive), total)
    loss: Tensor = unfused.forward(given) if name == "reference" else fused.discounted_loss(*given)[0]
    return loss
