"""AdamW with block-wise 8-bit moments in plain PyTorch: the meaning of the op, in float32, on any device.

Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022, with bitsandbytes'
dynamic maps and its layout of the states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.kernels.adamw_8bit.maps import BLOCK, ZERO_CODE, Step, boundaries, dynamic_map
from sqdf_fast.kernels.philox import philox_uint32

_SMALLEST = torch.finfo(torch.float32).tiny


def update(step: Step) -> None:
    """One step; 8-bit states come with absmax1 and absmax2."""
    if step.absmax1 is None or step.absmax2 is None:
        _update(step)
        return
    first = dequantize(step.state1, step.absmax1, signed=True)
    second = dequantize(step.state2, step.absmax2, signed=False)
    _update(step._replace(state1=first, state2=second))
    for moments, codes, absmax, signed in (
        (first, step.state1, step.absmax1, True),
        (second, step.state2, step.absmax2, False),
    ):
        new_codes, new_absmax = quantize(moments, signed=signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)


def _update(step: Step) -> None:
    """One step with moments in float32."""
    c, parameter, state1, state2 = step.coefficients, step.parameter, step.state1, step.state2
    scaled = step.gradient.to(torch.float32) * c.gradient_scale
    state1.copy_(state1 * c.beta1 + scaled * c.complement1)
    state2.copy_(state2 * c.beta2 + (scaled * scaled) * c.complement2)
    # PyTorch's float32 square root on a CPU is sometimes off by one bit; the rounded float64 root is exact.
    root = state2.to(torch.float64).sqrt().to(torch.float32)
    ratio = state1 / (root * c.root + c.eps)
    updated = parameter.to(torch.float32) * c.decay - ratio * c.step_size
    parameter.copy_(updated if parameter.dtype == torch.float32 else round_stochastically(updated, step.seed))


def sum_of_squares(tensors: list[Tensor]) -> float:
    """Sum over all elements, in float64."""
    return sum(tensor.to(torch.float64).square().sum().item() for tensor in tensors)


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """uint8 [n], float32 [ceil(n / 256)] -> float32 [n]."""
    values = dynamic_map(signed).to(codes.device)[codes.to(torch.int64)]
    return values * absmax.repeat_interleave(BLOCK)[: len(codes)]


def quantize(moments: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [n] -> the nearest codes uint8 [n], ties to the smaller magnitude, and absmax float32 [ceil(n / 256)].

    A second moment (not signed) that is not 0 takes at least code 1: with 0 the next step would divide by eps alone.
    A block whose largest magnitude is below the smallest normal float32 becomes 0: its reciprocal would overflow.
    """
    blocks = torch.nn.functional.pad(moments, (0, -len(moments) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax < _SMALLEST, 0, absmax)
    reciprocal = torch.where(absmax == 0, 0, 1 / absmax)
    scaled = (blocks * reciprocal[:, None]).flatten()[: len(moments)]
    level = torch.bucketize(scaled.abs(), boundaries(signed).to(moments.device))
    if signed:
        level = torch.where(scaled < 0, ZERO_CODE - level.clamp(max=ZERO_CODE), ZERO_CODE + level)
    else:
        level = torch.where((level == 0) & (scaled != 0), 1, level)
    return level.to(torch.uint8), absmax


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """float32 [n] -> bfloat16 [n]: one of the two neighbors, so that the mean is the value.

    16 random bits are added below the bits that stay. Element e takes the half word e // 256 % 2 (low, high) of word
    e // 64 % 4 of the Philox block at counter 64 (e // 512) + e % 64, under the key `seed`.
    """
    numel = len(values)
    seeds = torch.tensor([seed], dtype=torch.int64, device=values.device)
    words = philox_uint32(seeds, -(-numel // 512) * 256).to(torch.int32)
    drawn = words.view(-1, 64, 4).transpose(1, 2).reshape(-1, 1, BLOCK)
    random = torch.cat([drawn & 0xFFFF, (drawn >> 16) & 0xFFFF], dim=1).flatten()[:numel]
    # Only the bits of a NaN can overflow.
    rounded = ((values.view(torch.int32) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)
