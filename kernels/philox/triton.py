"""Philox on CUDA, with the arguments and results of reference.py. Other kernels draw through `normal_block`."""

# A kernel's arguments have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch

from sqdf_fast.kernels.philox.reference import Draw
from sqdf_fast.kernels.triton import BLOCK, jit, on, piece_of_row, pieces, tl, unavailable, warps

__all__ = ["normal", "normal_block", "unavailable", "words"]


@jit
def word_pairs(seed, i_piece, BLOCK: tl.constexpr):
    """The words of a piece of a sample: those at even offsets and those at odd offsets, [BLOCK / 4, 2] each."""
    counter = i_piece.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = counter * 0
    word0, word1, word2, word3 = tl.philox(seed, counter, zero, zero, zero)
    return tl.join(word0, word2), tl.join(word1, word3)


@jit
def uniform(word):
    """A word read as int32, folded to its non-negative half and scaled into [0, 1)."""
    value = word.to(tl.int32, bitcast=True)
    return (value ^ (value >> 31)).to(tl.float32) * 4.6566127342e-10


@jit
def log_positive(u):
    """Natural logarithm of a normal positive float, as in philox.h."""
    bits = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    tail = z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9))))
    # 0.693359375 has few enough bits for an exact product with the exponent; the rest of log 2 follows.
    return exponent * 0.693359375 + (2.0 * s + (s * tail + exponent * -2.12194440e-4))


@jit
def box_muller(word1, word2):
    """The cosine's and the sine's normal of a pair of words. libdevice's own functions would bring float64 in."""
    radius = tl.sqrt(-2.0 * log_positive(tl.maximum(uniform(word1), 1e-7)))
    angle = 6.2831853 * uniform(word2)
    quadrant = (angle * 0.63661977 + 0.5).to(tl.int32)
    turns = quadrant.to(tl.float32)
    # pi/2 in three parts, the first two exact when multiplied by a quadrant number.
    y = ((angle - turns * 1.5703125) - turns * 4.83751296997e-4) - turns * 7.54978995489e-8
    z = y * y
    s = y + y * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880))))
    c = 1.0 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))))
    odd = (quadrant & 1) != 0
    cosine = radius * tl.where(odd, s, c)
    sine = radius * tl.where(odd, c, s)
    return (
        tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine),
        tl.where((quadrant & 2) != 0, -sine, sine),
    )


@jit
def normal_block(seed, i_piece, BLOCK: tl.constexpr):
    """The standard normals of a sample's elements i_piece BLOCK + [0, BLOCK), float32 [BLOCK]."""
    even, odd = word_pairs(seed, i_piece, BLOCK)
    cosine, sine = box_muller(even, odd)
    return tl.reshape(tl.join(cosine, sine), (BLOCK,))


@jit(do_not_specialize=["n_pieces"])
def fill_kernel(seed, out, n_elements, n_pieces, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    i_row, i_piece, i_x, o_n, m_n = piece_of_row(n_elements, n_pieces, BLOCK)
    seed = tl.load(seed + i_row)
    if NORMAL:
        b_out = normal_block(seed, i_piece, BLOCK)
    else:
        even, odd = word_pairs(seed, i_piece, BLOCK)
        b_out = tl.reshape(tl.join(even, odd), (BLOCK,)).to(tl.int32, bitcast=True)
    tl.store(out + i_x + o_n, b_out, mask=m_n)


def words(draw: Draw) -> torch.Tensor:
    """int64 [B, 4 * ceil(numel / 4)], values in 0 .. 2^32 - 1."""
    seed, numel = draw
    return _fill(seed, 4 * math.ceil(numel / 4), torch.int32).to(torch.int64) & 0xFFFFFFFF


def normal(draw: Draw) -> torch.Tensor:
    """float32 [B, numel]."""
    seed, numel = draw
    return _fill(seed, numel, torch.float32)


def _fill(seed: torch.Tensor, elements: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(seed), elements, dtype=dtype, device=seed.device)
    if out.numel():
        n_pieces = pieces(elements)
        with on(seed.device):
            fill_kernel[(len(seed) * n_pieces,)](
                seed.contiguous(), out, elements, n_pieces, dtype == torch.float32, BLOCK, num_warps=warps(elements)
            )
    return out
