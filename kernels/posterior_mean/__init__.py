"""The clean sample predicted by a network output."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.dispatch import resolve
from sqdf_fast.kernels.posterior_mean import op as fused
from sqdf_fast.kernels.posterior_mean import reference as unfused
from sqdf_fast.kernels.posterior_mean.reference import Backward, Forward
from sqdf_fast.kernels.validation import (
    check_batch,
    check_floating,
    check_network_output,
    check_table,
    constant,
    math_dtype,
)


def posterior_mean(
    x: Tensor,
    model_output: Tensor,
    posterior: Tensor,
    index: Tensor,
    *,
    guidance_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x0_hat = a x + b m with (a, b) = posterior[index] and m = m_uncond + g (m_cond - m_uncond).

    Tweedie's formula for any prediction type, a consistency model's jump and a deterministic sampler step differ only
    in the table. A row with b = 0 never reads m: a NaN in m then reaches neither result nor gradient.
    Arithmetic is float32, or float64 when an input is float64. Gradients flow to `x` and `model_output` only.

    Args:
        x: [B, ...] latents, any float dtype, any strides.
        model_output: [2B, ...] ordered [uncond; cond] if guidance_scale != 1, else [B, ...].
        posterior: [T, 2] float32 or float64, columns a, b (`DenoisingSchedule.posterior`, a column pair of
            `Lookahead.rows`, or `transition[:, :2]` for the mean of a sampler step).
        index: [B] int64.
        guidance_scale: g.
        out_dtype: dtype of the result; None: that of x.
        impl: "auto", "triton", "native" or "reference".

    Returns:
        x0_hat shaped like x.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, an `impl` that cannot run.
    """
    op = "posterior_mean"
    check_batch(op, x=x)
    check_floating(op, x=x, model_output=model_output)
    check_network_output(op, "model_output", model_output, x, guidance_scale)
    check_table(op, "posterior", posterior, 2, index, x)
    dtype = x.dtype if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise UserError(f"{op}: out_dtype is {dtype}; it must be a floating-point dtype")
    # only the reference computes results of another dtype
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    precision = math_dtype(x, model_output) if known else torch.float64
    name = resolve(op, impl, x.device, precision)
    given = Forward(x, model_output, constant(posterior), index, float(guidance_scale), dtype)
    x0: Tensor = unfused.forward(given) if name == "reference" else fused.posterior_mean(*given)
    return x0


def posterior_mean_vjp(
    grad_x0: Tensor,
    posterior: Tensor,
    index: Tensor,
    *,
    guidance_scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The backward of `posterior_mean`: the cotangent of x0_hat -> those of x and of the network output.

    a grad_x0, and with G = b grad_x0 either [(1 - g) G; g G] under guidance or G without: the start of the network's
    backward.

    Args:
        grad_x0: [B, ...] d loss / d x0_hat, any float dtype.
        posterior, index, guidance_scale, impl: as given to `posterior_mean`.

    Returns:
        [B, ...] and [2B, ...] or [B, ...], float32 (float64 when grad_x0 is float64), without a graph.

    Raises:
        UserError: as `posterior_mean`.
    """
    op = "posterior_mean_vjp"
    check_batch(op, grad_x0=grad_x0)
    check_floating(op, grad_x0=grad_x0)
    check_table(op, "posterior", posterior, 2, index, grad_x0)
    dtype = math_dtype(grad_x0)
    name = resolve("posterior_mean", impl, grad_x0.device, dtype)
    given = Backward(grad_x0, constant(posterior), index, float(guidance_scale), dtype, dtype)
    with torch.no_grad():
        grad_x, grad_output = unfused.backward(given) if name == "reference" else fused.posterior_mean_backward(*given)
        return grad_x, grad_output
