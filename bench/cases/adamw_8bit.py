"""What does an AdamW step with 8-bit states cost on the CPU, against bitsandbytes and PyTorch's fused 32-bit one?

A step of one parameter through each optimizer's own `step`; and the norm of its gradient, which a clipped step computes
first. In the recorded rows "eager" is PyTorch: `torch.optim.AdamW(fused=True)`, `torch.nn.utils.get_total_norm`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import tables
from harness.benchmark import Benchmark, Choice, Group, Prepared, Row, Verdict, ratio, target
from harness.tables import Column
from harness.timing import PACE, TOY_PACE, Subject
from torch import Tensor, nn

from sqdf_fast.kernels import native

SIZES = {False: 2**22, True: 2**13}
LEAST = 3.0
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def groups(choice: Choice) -> Iterator[Group]:
    for direction in ("step", "norm") if choice.device == "cpu" else ():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            fields = {
                "direction": direction,
                "device": "cpu",
                "size": "4M",
                "shape": [SIZES[choice.toy]],
                "dtype": name,
            }
            yield Group(f"cpu-{name}-{direction}", tuple(_names(direction)), fields, (direction, dtype))


def _names(direction: str) -> list[str]:
    theirs = ["bitsandbytes"] if direction == "step" and importlib.util.find_spec("bitsandbytes") else []
    return ["eager", *(["native"] if native.available() else []), *theirs]


def prepare(group: Group, toy: bool) -> Prepared:
    """All of them, or none when ours is wrong."""
    direction, dtype = group.problem
    if wrong := fault(direction, dtype):
        return Prepared({}, dict.fromkeys(group.contenders, wrong), TOY_PACE, lambda name, medians: {})
    calls = _calls(direction, dtype, SIZES[toy], group.contenders)
    subjects = {name: Subject(lambda _, call=call: call()) for name, call in calls.items()}
    moved = SIZES[toy] * (3 * dtype.itemsize + 4 if direction == "step" else dtype.itemsize)

    def figures(name: str, medians: dict[str, float]) -> Row:
        return {
            "bytes_moved": moved,
            "bytes_formula": "parameter twice, gradient, two codes twice" if direction == "step" else "gradient",
            "gb_per_second": moved / medians[name] / 1e9,
            "times_eager": ratio(medians, "eager", name),
            "times_bitsandbytes": ratio(medians, "bitsandbytes", name),
        }

    return Prepared(subjects, {}, TOY_PACE if toy else PACE["cpu"], figures)


def _calls(direction: str, dtype: torch.dtype, numel: int, names: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    from sqdf_fast.engine.optimizers import gradient_norm

    start, gradient = _inputs(dtype, numel)
    if direction == "norm":
        norms = {
            "eager": lambda: nn.utils.get_total_norm([gradient]).item(),
            "native": lambda: gradient_norm([gradient]),
        }
        return {name: norms[name] for name in names}
    optimizers = {name: _optimizer(name, start) for name in names}
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["params"][0].grad = gradient.clone()
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def _optimizer(name: str, start: Tensor) -> torch.optim.Optimizer:
    from sqdf_fast.engine.optimizers import BlockwiseAdamW

    parameter = nn.Parameter(start.clone())
    if name == "eager":
        return torch.optim.AdamW([parameter], fused=True, **SETTINGS)
    if name in ("native", "reference"):
        return BlockwiseAdamW([parameter], impl=name, **SETTINGS)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit([parameter], **SETTINGS)
    return optimizer


def _inputs(dtype: torch.dtype, numel: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(numel, generator=generator).to(dtype)
    return start, (1e-3 * torch.randn(numel, generator=generator)).to(dtype)


def fault(direction: str, dtype: torch.dtype) -> str | None:
    """What is wrong with ours on a small parameter, or None: the reference's bits, and bitsandbytes' values."""
    from sqdf_fast.engine.optimizers import gradient_norm

    if not native.available():
        return None
    numel = 5 * 4096 + 3
    start, gradient = _inputs(dtype, numel)
    if direction == "norm":
        apart = abs(gradient_norm([gradient]) / gradient.double().norm().item() - 1)
        return None if apart < 1e-12 else f"norm: relative error {apart:.2e}"
    ours, same = (_after_steps(name, start) for name in ("native", "reference"))
    if not torch.equal(ours, same):
        return "the parameters are not the reference's to the bit"
    if dtype == torch.bfloat16 or "bitsandbytes" not in _names(direction):
        return None  # bitsandbytes rounds bfloat16 to nearest
    theirs, exact = (_after_steps(*given) for given in (("bitsandbytes", start), ("eager", start.double())))
    apart, own_error = ((other.double() - theirs.double()).norm().item() for other in (ours, exact))
    return None if apart <= own_error else f"{apart:.2e} from bitsandbytes, whose own error is {own_error:.2e}"


def _after_steps(name: str, start: Tensor) -> Tensor:
    optimizer = _optimizer(name, start)
    (parameter,) = optimizer.param_groups[0]["params"]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = (1e-3 * torch.randn(start.shape, generator=generator)).to(start.dtype)
        optimizer.step()
    return parameter.detach()


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Our step beside bitsandbytes'."""
    return [
        target(
            f"AdamW step with 8-bit states, {row['shape'][0]:,} {row['dtype']} parameters, native",
            row["times_bitsandbytes"],
            "x bitsandbytes",
            LEAST,
        )
        for row in rows
        if (row["op"], row["implementation"], row.get("direction")) == ("adamw_8bit", "native", "step")
    ]


COLUMNS = (
    Column("implementation", "implementation", text=True),
    Column("what", "direction"),
    Column("precision", "dtype"),
    Column("time", "median_seconds", tables.duration),
    Column("spread", "spread", ".0%"),
    Column("GB/s", "gb_per_second", ".1f"),
    Column("x PyTorch", "times_eager", ".2f"),
    Column("x bitsandbytes", "times_bitsandbytes", ".2f"),
)

BENCHMARK = Benchmark(
    name="adamw_8bit",
    page="optimizers.md",
    groups=groups,
    prepare=prepare,
    columns=COLUMNS,
    tables=lambda rows: [tables.table(COLUMNS, rows)],
    verdicts=verdicts,
)
