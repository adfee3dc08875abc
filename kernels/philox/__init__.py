"""Counter-based noise: element e of a sample depends on the sample's seed and on e alone.

Chunking, neighbors and batch size therefore never change a sample's noise. Word 4 c + lane of a sample is lane `lane`
of Philox-4x32-10 at counter (c, 0, 0, 0) under the key (seed's low half, seed's high half): what Triton's
`randint4x(seed, c)` and `randn4x(seed, c)` draw with a 32-bit offset c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.dispatch import module, resolve
from sqdf_fast.kernels.operators import Operator, schema
from sqdf_fast.kernels.philox import reference
from sqdf_fast.kernels.philox.reference import Draw

__all__ = ["MAX_ELEMENTS", "derive_seed", "derive_seeds", "philox_normal", "philox_uint32"]

MAX_ELEMENTS = 4 * 2**32
"""Largest number of elements of a sample: four per counter, 32-bit counters."""


def philox_normal(
    seed: torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Standard normal noise from one seed per sample.

    Args:
        seed: int64 [B].
        shape: the shape of one sample, without B; at most 2^34 elements.
        dtype: Dtype of the result. The noise is drawn in float32 and then converted.
        device: Device of the result; None: that of the seed.
        impl: "auto", "triton", "native" or "reference".

    Returns:
        [B, *shape]. Two implementations differ by at most 2e-6.

    Raises:
        UserError: the seed is not int64 [B], a sample is too large, or impl cannot run here.
    """
    numel = math.prod(shape)
    _check(seed, numel)
    seed = seed if device is None else seed.to(device)
    name = resolve("philox", impl, seed.device, torch.float32)
    noise: torch.Tensor = (_reference if name == "reference" else _fused)(seed, numel)
    return noise.view(len(seed), *shape).to(dtype)


def philox_uint32(seed: torch.Tensor, numel: int, *, impl: str = "auto") -> torch.Tensor:
    """The 32-bit words behind `philox_normal`.

    Args:
        seed: int64 [B].
        numel: elements of one sample, at most 2^34.
        impl: "auto", "triton", "native" or "reference".

    Returns:
        int64 [B, 4 * ceil(numel / 4)], values in 0 .. 2^32 - 1, the same in every implementation.

    Raises:
        UserError: as `philox_normal`.
    """
    _check(seed, numel)
    name = resolve("philox", impl, seed.device, torch.float32)
    found: torch.Tensor = module("philox", name).words(Draw(seed, numel))
    return found


def derive_seed(*integers: int) -> int:
    """One int64 seed from a sequence of integers, such as (run seed, stream, step, sample id).

    Each integer is taken modulo 2^64 and absorbed in turn, h <- mix(mix(h + 0x9E3779B97F4A7C15) ^ integer), h
    starting at 0, with the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) as mix. Order and length matter; different last integers after the same prefix
    never collide.
    """
    state = 0
    for integer in integers:
        state = _mix(_mix((state + 0x9E3779B97F4A7C15) & _MASK64) ^ (integer & _MASK64))
    return state - 2**64 if state >= 2**63 else state


def derive_seeds(*base: int, ids: torch.Tensor) -> torch.Tensor:
    """`derive_seed(*base, id)` for every id: ids int64 [B] -> int64 [B] on the same device."""
    prefix = _signed(_mix((derive_seed(*base) + 0x9E3779B97F4A7C15) & _MASK64))
    return _mix_tensor(ids.to(torch.int64) ^ prefix)


def _fake(draw: Draw) -> torch.Tensor:
    return draw.seed.new_empty((len(draw.seed), draw.numel), dtype=torch.float32)


_fused = Operator("philox", "normal", Draw, 1, _fake)
# The reference is an operator too: a memory simulation must not count its integers, which no fused kernel has.
_reference = torch.library.custom_op(
    "sqdf_fast::philox_normal_reference",
    lambda *given: reference.normal(Draw(*given)),
    mutates_args=(),
    schema=schema(Draw, 1),
)
_reference.register_fake(lambda *given: _fake(Draw(*given)))


def _check(seed: torch.Tensor, numel: int) -> None:
    if seed.dtype != torch.int64 or seed.dim() != 1:
        raise UserError(f"philox: seed must be int64 [B], one per sample, not {seed.dtype} {list(seed.shape)}")
    if not 0 <= numel <= MAX_ELEMENTS:
        raise UserError(f"philox: a sample has 0 to {MAX_ELEMENTS} elements (32-bit counters), not {numel}")


_MASK64 = 2**64 - 1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    # int64's own shift copies the sign bit.
    return (value >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
