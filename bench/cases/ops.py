"""What does a fused op cost beside eager PyTorch and torch.compile? Everything about an op is its own declaration.

A row is an op x size x dtype x noise x direction x implementation. Bytes are those that an op has to move: every
streamed input read once, every streamed output written once; numbers of which a sample has one do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial

import torch
from harness import tables
from harness.benchmark import Benchmark, Choice, Group, Prepared, Row, Verdict, ratio, target
from harness.tables import Column, Table
from harness.timing import PACE, TOY_PACE, Subject

from cases import parity
from cases.parity import BASELINES, Setup, declaration, make
from sqdf_fast.kernels import registry
from sqdf_fast.kernels.dispatch import IMPLEMENTATIONS, reason_against
from sqdf_fast.kernels.spec import Forward, Problem

OPS = registry.benchmarked()


def problems(op: str, device: str, toy: bool) -> Iterator[Problem]:
    """What every implementation is given."""
    declared = declaration(op)
    halves = declared.half_precision_on_cuda and device == "cuda"
    for size in declared.sizes:
        for dtype in (torch.float32, torch.bfloat16) if halves else (torch.float32,):
            for noise in declared.noise:
                yield Problem(op, size.name, size.shape(device, toy), dtype, device, noise)


def groups(op: str, choice: Choice) -> Iterator[Group]:
    """What is timed; the directions of a problem follow each other."""
    device = choice.device
    for problem in problems(op, device, choice.toy):
        dtype = str(problem.dtype).removeprefix("torch.")
        noise = f"noise_{problem.noise}" if problem.noise else ""
        for direction in declaration(op).directions:
            fields = {
                "direction": direction,
                "device": device,
                "size": problem.size,
                "shape": list(problem.shape),
                "dtype": dtype,
                "noise": problem.noise,
            }
            name = "-".join(filter(None, (device, problem.size, dtype, noise, direction)))
            yield Group(name, tuple(implementations(op, device)), fields, problem)


def implementations(op: str, device: str) -> list[str]:
    """Baselines, then our implementations that run there; the reference is the measure of parity, not of speed."""
    ours = [name for name in IMPLEMENTATIONS if name != "reference" and absent(op, name, device) is None]
    return [*(BASELINES if declaration(op).compiled else BASELINES[:1]), *ours]


def absent(op: str, name: str, device: str) -> str | None:
    """Why one of our implementations is not measured there, or None."""
    return reason_against(op, name, torch.device(device), torch.float32)


def bytes_moved(problem: Problem, direction: str) -> int:
    """Bytes read and written; 0 for an op that streams nothing."""
    return declaration(problem.op).moved(problem, direction) * problem.elements * problem.dtype.itemsize


def formula(problem: Problem, direction: str) -> str:
    """The count of `bytes_moved`, as it is recorded."""
    moved = declaration(problem.op).moved(problem, direction)
    return f"{moved} N e, N = {problem.elements}, e = {problem.dtype.itemsize}"


def prepare(group: Group, toy: bool) -> Prepared:
    """Subjects of the implementations inside the error budget, and a copy of as many bytes as the op moves."""
    problem, direction = group.problem, group.fields["direction"]
    setup, forwards, faults = _checked(problem, group.contenders)
    subjects = {name: subject(setup, forward, direction) for name, forward in forwards.items()}
    half = bytes_moved(problem, direction) // 2
    if half:
        source = torch.randint(256, (half,), dtype=torch.uint8, device=problem.device)
        destination = torch.zeros_like(source)
        subjects["copy"] = Subject(lambda _: destination.copy_(source))
    pace = TOY_PACE if toy else PACE[problem.device]
    return Prepared(subjects, faults, pace, partial(figures, problem, direction))


@lru_cache(maxsize=1)  # the directions of a problem follow each other
def _checked(problem: Problem, names: tuple[str, ...]) -> tuple[Setup, dict[str, Forward], dict[str, str]]:
    setup = make(problem)
    expected = parity.truth(setup)
    forwards, faults = {}, {}
    for name in names:
        try:
            forward = setup.forward(name)
            found = parity.fault(setup, expected, forward, own_noise=problem.noise == "drawn" and name in BASELINES)
        except Exception as error:  # whatever it is, it is this implementation's result; the others are measured
            found = f"raised {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if found:
            faults[name] = found
        else:
            forwards[name] = forward
    return setup, forwards, faults


def subject(setup: Setup, forward: Forward, direction: str) -> Subject:
    """The call that `direction` times."""
    if direction == "forward":
        return Subject(lambda _: forward())
    if direction == "backward":
        return Subject(setup.backward, prepare=forward)

    def both(_: object) -> object:
        outputs = forward()
        return outputs, setup.backward(outputs)

    return Subject(both)


def figures(problem: Problem, direction: str, name: str, medians: Mapping[str, float]) -> Row:
    """What is recorded of a contender beside its time."""
    moved = bytes_moved(problem, direction)
    copy = moved // 2 * 2 / medians["copy"] / 1e9 if "copy" in medians else None
    achieved = moved / medians[name] / 1e9 if moved else None
    return {
        "bytes_moved": moved,
        "bytes_formula": formula(problem, direction),
        "gb_per_second": achieved,
        "copy_gb_per_second": copy,
        "copy_fraction": achieved / copy if achieved and copy else None,
        "times_eager": ratio(medians, "eager", name),
        "times_compile": ratio(medians, "compile", name),
    }


def _targets() -> Iterator[tuple[str, float, dict[str, str]]]:
    """Figure, least value, and the fields of the row that is held to it."""
    for noise in ("given", "drawn"):
        cpu = {"device": "cpu", "implementation": "native", "dtype": "float32", "noise": noise}
        for size in ("sd15", "sdxl", "video"):
            yield "times_eager", 3.0, {**cpu, "size": size}
            if noise == "given":
                yield "times_compile", 1.2, {**cpu, "size": size}
        yield "copy_fraction", 0.7, {**cpu, "size": "beyond-cache"}
        for dtype in ("float32", "bfloat16"):
            cuda = {"device": "cuda", "implementation": "triton", "dtype": dtype, "noise": noise}
            yield "times_eager", 5.0, {**cuda, "size": "sd15"}
            yield "times_compile", 1.3, {**cuda, "size": "sd15"}
            yield "copy_fraction", 0.9, {**cuda, "size": "beyond-cache"}


_UNITS = {"times_eager": "x eager", "times_compile": "x torch.compile", "copy_fraction": "of the copy bandwidth"}


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Every target of denoise_step, forward + backward, on each device where an op was measured."""
    devices = {row["device"] for row in rows if row["op"] in OPS}
    found = []
    for figure, least, fields in _targets():
        if fields["device"] in devices:
            wanted = {"op": "denoise_step", "direction": "both", **fields}
            answers = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
            value = answers[0][figure] if answers else None
            what = "{size} {dtype}, noise {noise}, {implementation}".format(**fields)
            found.append(target(f"denoise_step forward + backward, {what}", value, _UNITS[figure], least))
    return found


COLUMNS = (
    Column("size", "size", text=True),
    Column("dtype", "dtype", text=True),
    Column("noise", "noise", text=True),
    Column("direction", "direction", text=True),
    Column("implementation", "implementation", text=True),
    Column("time", "median_seconds", tables.duration),
    Column("spread", "spread", ".0%"),
    Column("x eager", "times_eager", ".2f", against="eager"),
    Column("x compile", "times_compile", ".2f", against="compile"),
    Column("GB/s", "gb_per_second", ".1f"),
    Column("of copy", "copy_fraction", ".0%"),
    Column("peak", "peak_bytes", lambda count: f"{count / 2**20:.1f} MiB"),
)
SIDE_BY_SIDE = (
    Column("size", "size", text=True),
    Column("noise", "noise", text=True),
    Column("direction", "direction", text=True),
    Column("eager", "eager", tables.duration),
    Column("torch.compile", "compile", tables.duration),
    Column("ours", "ours", tables.duration),
    *(
        column
        for column in COLUMNS
        if column.field in ("times_eager", "times_compile", "gb_per_second", "copy_fraction")
    ),
    Column("peak: eager / compile / ours", "peaks"),
)


def side_by_side(rows: list[Row]) -> list[Table]:
    """A table a dtype, a line a group: the baselines and ours beside each other."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in rows:
            if row["dtype"] == dtype:
                line = lines.setdefault((row["size"], row["noise"], row["direction"]), {})
                line[row["implementation"] if row["implementation"] in BASELINES else "ours"] = row
        title = f"**{rows[0]['op']}**, {dtype}"
        found.append(tables.table(SIDE_BY_SIDE, [_line(line) for line in lines.values()], title))
    return found


def _line(by_name: dict[str, Row]) -> Row:
    every = [by_name.get(name) for name in (*BASELINES, "ours")]
    peaks = " / ".join("-" if row is None else f"{row['peak_bytes'] / 2**20:.1f}" for row in every)
    shared = {name: next(iter(by_name.values()))[name] for name in ("size", "noise", "direction")}
    times = {name: row["median_seconds"] for name, row in by_name.items()}
    return {**by_name.get("ours", shared), **times, "peaks": f"{peaks} MiB"}


BENCHMARKS = tuple(
    Benchmark(
        name=op,
        page="benchmarks.md",
        groups=partial(groups, op),
        prepare=prepare,
        columns=COLUMNS,
        tables=side_by_side,
        verdicts=verdicts if op == "denoise_step" else lambda rows: [],
    )
    for op in OPS
)
