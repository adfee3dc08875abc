"""One denoising step of the policy and its KL to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.denoise_step import op as fused
from sqdf_fast.kernels.denoise_step import reference as unfused
from sqdf_fast.kernels.denoise_step.reference import Backward, Forward
from sqdf_fast.kernels.dispatch import resolve
from sqdf_fast.kernels.philox import MAX_ELEMENTS
from sqdf_fast.kernels.validation import (
    check_batch,
    check_floating,
    check_network_output,
    check_table,
    constant,
    math_dtype,
)


def denoise_step(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    transition: Tensor,
    index: Tensor,
    *,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    kl_scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw x_{t-1} ~ p_policy(. | x_t), reparameterized, and measure the KL to the reference's transition.

    With (p, q, sigma) = transition[index] and m = m_uncond + g (m_cond - m_uncond):

        x_prev = p x + q m + sigma z,     z ~ N(0, I)
        kl     = kl_scale * mean over the elements of a sample of (q (m - m_ref) / sigma)^2

    The published programs use kl_scale = 1; 0.5 is the Gaussian KL per element. The KL of equal outputs is exactly 0,
    and so is its gradient. Where sigma = 0 (a deterministic step) the KL of different outputs is infinite: draw only
    the schedule's trainable indices. Gradients flow to `x` and `policy` only. Arithmetic is float32, or float64 when an
    input is float64.

    Args:
        x: [B, ...] latents at the step's level, any float dtype, any strides.
        policy: the policy's network output, [2B, ...] ordered [uncond; cond]; [B, ...] if guidance_scale = 1.
        reference: network output of the frozen reference, like `policy`.
        transition: [T, 3] float32 or float64, columns p, q, sigma (`DenoisingSchedule.transition`).
        index: [B] int64, positions in the schedule, 0 = noisiest.
        guidance_scale: g.
        noise: z, shaped like x; exactly one of `noise` and `seed`.
        seed: [B] int64, one per sample; z is then counter-based and independent of the sample's neighbors.
        kl_scale: factor of the KL.
        impl: "auto", "triton", "native" or "reference".

    Returns:
        x_prev in the shape and dtype of x; kl [B] float32 (float64 when an input is float64).

    Raises:
        UserError: shapes, dtypes or devices that do not fit, both or neither of noise and seed, an `impl` that cannot
            run.
    """
    # the backward needs delta, and only for the policy
    with_delta = policy.requires_grad and torch.is_grad_enabled()
    settings = float(guidance_scale), noise, seed, float(kl_scale), with_delta
    x_prev, kl, _ = _step(Forward(x, policy, reference, transition, index, *settings), impl)
    return x_prev, kl


def denoise_step_staged(
    x: Tensor,
    policy: Tensor,
    reference: Tensor,
    transition: Tensor,
    index: Tensor,
    *,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    kl_scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`denoise_step` that also returns delta = m - m_ref, which is all its backward needs: see `denoise_step_vjp`.

    Returns:
        x_prev, kl as `denoise_step`; delta shaped like x, in the dtype of `policy`, carrying no gradient.
    """
    settings = float(guidance_scale), noise, seed, float(kl_scale), True
    x_prev, kl, delta = _step(Forward(x, policy, reference, transition, index, *settings), impl)
    return x_prev, kl, delta.detach()


def denoise_step_vjp(
    grad_x_prev: Tensor,
    grad_kl: Tensor,
    delta: Tensor,
    transition: Tensor,
    index: Tensor,
    *,
    guidance_scale: float = 1.0,
    kl_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """The backward of `denoise_step_staged`: cotangents of x_prev and kl -> cotangent of the policy's output.

    With G = q grad_x_prev + grad_kl 2 kl_scale q^2 / (sigma^2 N) delta, N the elements of a sample, this is
    [(1 - g) G; g G] under guidance and G without: what the policy network's backward starts from.

    Args:
        grad_x_prev: [B, ...] d loss / d x_prev.
        grad_kl: [B] d loss / d kl.
        delta: [B, ...] from `denoise_step_staged`.
        transition, index, guidance_scale, kl_scale, impl: as given to `denoise_step_staged`.

    Returns:
        [2B, ...] or [B, ...], float32 (float64 when an input is float64), without a graph. Scale it before a cast to
        float16.
    """
    op = "denoise_step_vjp"
    check_batch(op, delta=delta)
    check_floating(op, delta=delta, grad_x_prev=grad_x_prev, grad_kl=grad_kl)
    check_table(op, "transition", transition, 3, index, delta)
    if grad_x_prev.shape != delta.shape or grad_kl.shape != index.shape:
        raise UserError(
            f"{op}: grad_x_prev has shape {tuple(grad_x_prev.shape)}, grad_kl {tuple(grad_kl.shape)}; "
            f"with delta {tuple(delta.shape)} they must be {tuple(delta.shape)} and [{delta.shape[0]}]"
        )
    name = resolve("denoise_step", impl, delta.device, math_dtype(grad_x_prev, grad_kl, delta))
    scales = float(guidance_scale), float(kl_scale)
    given = Backward(grad_x_prev, grad_kl, delta, transition, index, *scales, None, torch.float32)
    with torch.no_grad():
        grad_policy: Tensor = (
            unfused.policy_gradient(given) if name == "reference" else fused.denoise_step_backward(*given)[1]
        )
        return grad_policy


def _step(given: Forward, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    x, policy, reference, transition, index, guidance_scale, noise, seed, kl_scale, with_delta = given
    op = "denoise_step"
    check_batch(op, x=x)
    check_floating(op, x=x, policy=policy, reference=reference, noise=noise)
    check_network_output(op, "policy", policy, x, guidance_scale)
    check_network_output(op, "reference", reference, x, guidance_scale)
    check_table(op, "transition", transition, 3, index, x)
    _check_noise(x, noise, seed)
    name = resolve(op, impl, x.device, math_dtype(x, policy, reference, noise))
    noise = None if noise is None else constant(noise)
    fixed = constant(reference), constant(transition), index, guidance_scale, noise, seed
    if name == "reference":
        return unfused.forward(Forward(x, policy, *fixed, kl_scale, with_delta))
    x_prev, kl, delta = fused.denoise_step(x, policy, *fixed, kl_scale, with_delta)
    return x_prev, kl, delta


def _check_noise(x: Tensor, noise: Tensor | None, seed: Tensor | None) -> None:
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise UserError(f"denoise_step: exactly one of noise and seed must be given, got {given}")
    if seed is not None and x[0].numel() > MAX_ELEMENTS:
        raise UserError(f"denoise_step: a sample of {x[0].numel()} elements is more than a seed can draw; pass noise")
    if noise is not None and noise.shape != x.shape:
        raise UserError(f"denoise_step: noise has shape {tuple(noise.shape)}; it must be {tuple(x.shape)}, like x")
    if seed is not None and (
        seed.dtype != torch.int64 or tuple(seed.shape) != (x.shape[0],) or seed.device != x.device
    ):
        raise UserError(
            f"denoise_step: seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; "
            f"it must be int64 [{x.shape[0]}] on {x.device}"
        )
