"""Classifier-free guidance and broadcasting of per-sample coefficients, as the references use them."""

from __future__ import annotations

from torch import Tensor


def guide(output: Tensor, guidance_scale: float) -> Tensor:
    """[2B, ...] ordered [uncond; cond] -> m_uncond + g (m_cond - m_uncond), [B, ...]; as it is for g = 1."""
    if guidance_scale == 1:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply with x [B, ...]."""
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))
