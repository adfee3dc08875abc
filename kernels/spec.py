"""What an op declares about itself in `<op>/spec.py`, for the tests, the compile gate and the benchmarks.

Importing `sqdf_fast.kernels` imports none of this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GUIDANCE_SCALE = 7.5
"""Guidance scale of every benchmark."""

TABLE_ROWS = 50
"""Steps of the benchmarks' coefficient tables."""


@dataclass(frozen=True)
class Size:
    """A named size of a benchmark: its shape on the CPU, on CUDA (None: the same) and for a trial run (`--toy`)."""

    name: str
    cpu: tuple[int, ...]
    toy: tuple[int, ...]
    cuda: tuple[int, ...] | None = None

    def shape(self, device: str, toy: bool) -> tuple[int, ...]:
        """The shape to measure on "cpu" or "cuda"."""
        return self.toy if toy else (self.cuda or self.cpu) if device == "cuda" else self.cpu


LATENTS = (
    Size("sd15", (8, 4, 64, 64), toy=(2, 4, 8, 8)),
    Size("sdxl", (4, 4, 128, 128), toy=(1, 4, 16, 16)),
    Size("video", (1, 16, 13, 60, 90), toy=(1, 4, 3, 6, 9)),
    # All tensors together exceed the last-level cache, yet each stays below 32 MiB: glibc returns larger blocks to the
    # system when they are freed, and every allocation then pays for page faults.
    Size("beyond-cache", (3, 16, 13, 60, 90), toy=(3, 4, 3, 6, 9), cuda=(32, 16, 13, 60, 90)),
)


@dataclass(frozen=True)
class Problem:
    """One set of inputs. `noise` is "given", "drawn", or "" for an op without noise."""

    op: str
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    noise: str

    @property
    def elements(self) -> int:
        """Elements of x, or terms of the loss."""
        return math.prod(self.shape)


Given = Mapping[str, Any]
"""Tensors by the public function's argument names."""
Outputs = tuple[Tensor, ...]
Calls = dict[str, tuple[Any, tuple[Any, ...]]]
"""PyTorch operators with arguments, by the name of the case."""
Forward = Callable[[], Outputs]
Normal = Callable[..., Tensor]
"""normal(*shape): standard normal numbers in the problem's dtype on its device, the same for the same problem."""
Treat = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is done to the eager function before it runs: nothing, or torch.compile."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem."""

    given: dict[str, Tensor]  # by the public function's argument names
    leaves: tuple[str, ...] = ()  # names of the inputs that are differentiated
    cotangents: Outputs = ()  # one tensor per output
    noise: Tensor | None = None  # what the exact result adds: the noise given, or drawn from the seed


@dataclass(frozen=True)
class Benchmark:
    """How an op is measured."""

    sizes: tuple[Size, ...]
    inputs: Callable[[Problem, Normal], Inputs]  # random inputs
    ours: Callable[[Problem, Given, str], Outputs]  # the public function with that `impl`
    eager: Callable[[Problem, Given, Treat], Forward]  # the op as one writes it in PyTorch, treated with `treat`
    outputs: tuple[str, ...]  # a name for each
    tensors_moved: Mapping[str, int]  # by direction: times that N elements are read or written, beside given noise
    noise: tuple[str, ...] = ("",)  # the values of `Problem.noise` measured
    half_precision_on_cuda: bool = False  # bfloat16 on CUDA beside float32
    compiled: bool = True  # torch.compile is measured; not where eager is a single call
    own_precision: frozenset[str] = frozenset()  # inputs that a lower precision of the problem leaves as they are
    noise_behind: Callable[[Given, Outputs], Tensor] | None = None
    """(inputs in float64, outputs) -> the standard normal numbers that a baseline drew with its own generator."""

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed: the forward alone for an op without a backward."""
        return ("forward", "backward", "both") if "backward" in self.tensors_moved else ("forward",)

    def moved(self, problem: Problem, direction: str) -> int:
        """How many times N elements have to be read or written."""
        if direction == "both":
            return self.moved(problem, "forward") + self.moved(problem, "backward")
        return self.tensors_moved[direction] + (problem.noise == "given" and direction == "forward")


@dataclass(frozen=True)
class Spec:
    """What an op declares."""

    operator_calls: Callable[[str], Calls] = lambda device: {}
    """(device) -> every PyTorch operator of the op with arguments for it."""
    launches: Callable[[bool], Iterator[Callable[[], object]]] | None = None
    """(quick) -> calls of its Triton launchers on tensors without memory, for every dtype and flag, or a subset."""
    benchmark: Benchmark | None = None
    """How `pytest bench/` measures it; None: bench/ has a case of its own."""


# What the operator calls of several ops share.


def example(device: str) -> tuple[Tensor, ...]:
    """x, policy, reference, table, index, noise, seed of a small guided step: latents float32, outputs bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 4, 5, 3, generator=generator) for _ in range(2))
    policy, reference = (torch.randn(4, 4, 5, 3, generator=generator).bfloat16() for _ in range(2))
    table = torch.tensor([[1.02, -0.031, 0.17], [1.4, -0.62, 0.29]])
    found = x, policy, reference, table, torch.tensor([1, 0]), noise, torch.tensor([7, -9])
    return tuple(tensor.to(device) for tensor in found)


# What the benchmarks of several ops share.


def network_output(batch: int, sample: tuple[int, ...], normal: Normal) -> Tensor:
    """[2B, ...], two halves a tenth apart, as a prompt changes a network's output."""
    unconditional = normal(batch, *sample)
    return torch.cat([unconditional, unconditional + 0.1 * normal(batch, *sample)])


def table(columns: int, device: str) -> Tensor:
    """A coefficient table, float32 [50, columns]."""
    ramp = torch.linspace(0.3, 0.9, TABLE_ROWS)
    return torch.stack([1.0 + 0.1 * ramp, -0.5 * ramp, ramp][:columns], dim=1).to(device)


def index(batch: int, device: str) -> Tensor:
    """Positions in the table, int64 [B]."""
    return (torch.arange(batch, device=device) * 7) % TABLE_ROWS


def seeds(batch: int, device: str) -> Tensor:
    """Seeds, int64 [B]."""
    return torch.arange(batch, device=device) * 1_000_003 + 17


def columns(table: Tensor, index: Tensor, x: Tensor) -> Outputs:
    """The coefficients of every sample, each [B, 1, ..., 1], as one looks them up in PyTorch."""
    return table[index].reshape(len(index), -1, *(1,) * (x.ndim - 1)).unbind(1)


def guided(output: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance as one writes it in PyTorch, in float32."""
    unconditional, conditional = output.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


# What the launches of several ops share.

ALIGNED, RAGGED, LONG, SINGLE = 4096, 4099, 2**33, 1
"""Elements of a sample."""

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)
"""Of the latents and of the network outputs."""


def lengths(quick: bool) -> tuple[int, ...]:
    """Elements of a sample for which launches are compiled."""
    return (ALIGNED,) if quick else (ALIGNED, RAGGED, LONG, SINGLE)


def latents(quick: bool) -> Iterator[tuple[torch.dtype, torch.dtype, int, float, bool]]:
    """Dtypes of latents and network outputs, elements, guidance scale, and whether one set of flags is enough."""
    for (dtype, output), length in itertools.product(DTYPES, lengths(quick)):
        few = quick or length in (LONG, SINGLE)
        unguided = not few or (quick and (dtype, output) == DTYPES[0])
        for g in (5.0, 1.0) if unguided else (5.0,):
            yield dtype, output, length, g, few


def wanted(
    x_dtype: torch.dtype, output_dtype: torch.dtype, few: bool
) -> list[tuple[torch.dtype | None, torch.dtype | None]]:
    """Dtypes of the gradients that a backward is compiled for."""
    both = x_dtype, output_dtype
    return [both] if few else [both, (None, output_dtype), (x_dtype, None)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
