"""Which cases are measured: op x size x dtype x noise x direction x implementation, a device at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.dispatch import IMPLEMENTATIONS, reason_against

BASELINES = ("eager", "compile")
DIRECTIONS = ("forward", "backward", "both")
GUIDANCE_SCALE = 7.5

_LATENTS = {"sd15": (8, 4, 64, 64), "sdxl": (4, 4, 128, 128), "video": (1, 16, 13, 60, 90)}
# Beyond the last-level cache in all (page.py says how far), yet every tensor below the 32 MiB from which glibc returns
# a block to the system when it is freed and faults it in anew when it is allocated.
_BEYOND_CACHE = {"cpu": (3, 16, 13, 60, 90), "cuda": (32, 16, 13, 60, 90)}
_BATCHES = {"batch64": (64,), "4x64": (4, 64)}
_TOY = {
    "sd15": (2, 4, 8, 8),
    "sdxl": (1, 4, 16, 16),
    "video": (1, 4, 3, 6, 9),
    "beyond-cache": (3, 4, 3, 6, 9),
    "batch64": (64,),
    "4x64": (4, 64),
}


@dataclass(frozen=True)
class Problem:
    """What every implementation of a row is given. `noise` is "given", "drawn", or "" for an op without noise."""

    op: str
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    noise: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Case:
    """One number of the report."""

    problem: Problem
    direction: str
    implementation: str

    @property
    def row(self) -> str:
        """The name that the implementations compared with each other share."""
        problem = self.problem
        dtype = str(problem.dtype).removeprefix("torch.")
        noise = f"noise_{problem.noise}" if problem.noise else ""
        return "-".join(filter(None, (problem.device, problem.size, dtype, noise, self.direction)))

    @property
    def id(self) -> str:
        return f"{self.row}-{self.implementation}"


def cases(op: str, devices: list[str], toy: bool) -> Iterator[Case]:
    """All cases of one op; the implementations of a row, and the rows of a problem, follow each other."""
    for device in devices:
        for problem in _problems(op, device, toy):
            for direction in DIRECTIONS if op != "philox" else DIRECTIONS[:1]:
                for implementation in implementations(op, device, problem.dtype):
                    yield Case(problem, direction, implementation)


def implementations(op: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Baselines, then our implementations that run there; the reference is the measure of parity, not of speed."""
    ours = [name for name in IMPLEMENTATIONS if name != "reference" and absent(op, name, device, dtype) is None]
    # One call to the generator is all there is to compile.
    return [*(BASELINES[:1] if op == "philox" else BASELINES), *ours]


def absent(op: str, name: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why one of our implementations is not measured there, or None."""
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return reason_against(op, name, torch.device(device), math_dtype)


def devices(choice: str) -> list[str]:
    """ "all" -> the CPU, and CUDA where there is a GPU; otherwise the one named.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if choice == "all":
        return found
    if choice not in found:
        raise UserError(f"device {choice} is not there: choose one of all, {', '.join(found)}")
    return [choice]


def _problems(op: str, device: str, toy: bool) -> Iterator[Problem]:
    sizes = _BATCHES if op == "discounted_loss" else {**_LATENTS, "beyond-cache": _BEYOND_CACHE[device]}
    halves = device == "cuda" and op in ("denoise_step", "posterior_mean")
    for size, shape in sizes.items():
        for dtype in (torch.float32, torch.bfloat16) if halves else (torch.float32,):
            for noise in {"denoise_step": ("given", "drawn"), "philox": ("drawn",)}.get(op, ("",)):
                yield Problem(op, size, _TOY[size] if toy else shape, dtype, device, noise)
