"""Measures a problem: parity of every way to run its step, then interleaved times, FLOPs, and memory by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from fused_ops.summary import spread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sqdf_fast.config import PRESETS
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError
from training_step import prediction, setups
from training_step.cases import PUBLISHED, Problem, parity_problem
from training_step.setups import Ours, Step

Row = dict[str, Any]

ROUNDS = {"cpu": 3, "cuda": 7}
TOY_ROUNDS = 2

ALLOWANCE = 1e-6
"""Relative error of a gradient beyond twice that of the published way in the same precision, float32."""
CEILING = 1e-3
"""Relative error that rounding can explain at all: the published way itself has to stay below it."""

REPLAY = PRESETS["shapes"]["replay"]["steps_per_refill"]
REPLAY_RATIOS = (1, REPLAY)
"""Optimizer steps a refill of as many trajectories as a step has samples: 1, and the shipped preset's."""

_MARK = "stage: "


def measure(problem: Problem) -> list[Row]:
    """A row for every way to run the step; one without parity has its fault and no figures."""
    steps = setups.make(problem)
    judged = parity_problem(problem)
    faults, errors = parity(judged, steps if judged == problem else setups.make(judged))
    sound = {name: step for name, step in steps.items() if name not in faults}
    samples = interleave(sound, problem.device, TOY_ROUNDS if problem.toy else ROUNDS[problem.device])
    sampling = sampling_flops(problem) if problem.model == "shapes" else None
    rows = [_described(problem, name, errors, faults) for name in steps]
    for row in rows:
        name = row["implementation"]
        if name in sound:
            row.update(_figures(problem, name, sound[name], samples[name], sampling))
    _compare(rows)
    return rows


def parity(problem: Problem, steps: dict[str, Step]) -> tuple[dict[str, str], dict[str, float]]:
    """Why a way's gradient is wrong, by name, and every way's relative L2 error.

    Truth is the staged executor's gradient in float64. Without the published way's parity nothing has a figure: there
    is nothing to compare with.
    """
    with torch.backends.cudnn.flags(allow_tf32=False):
        truth = Ours(problem, torch.float64).step("staged + recompute").gradient()
        errors = {name: float((step.gradient() - truth).norm() / truth.norm()) for name, step in steps.items()}
    baseline = errors[PUBLISHED]
    if not baseline <= CEILING:
        reason = f"the published way's gradient has relative error {baseline:.2e}, at most {CEILING:.0e}"
        return dict.fromkeys(steps, reason), errors
    budget = 2 * baseline + ALLOWANCE
    return {
        name: f"gradient: relative error {error:.2e}, budget {budget:.2e}"
        for name, error in errors.items()
        if not error <= budget  # NaN is outside every budget
    }, errors


def interleave(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, all ways in turn, the order reversed from round to round, so that a slow moment hits all.

    As `fused_ops.timing.interleave`, but a turn is one run: it takes long enough to fill caches and queues itself, and
    all have run before.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            steps[name].prepare()
            _wait(device)
            started = time.perf_counter()
            steps[name].call()
            _wait(device)
            taken[name].append(time.perf_counter() - started)
        order.reverse()
    return taken


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _described(problem: Problem, name: str, errors: dict[str, float], faults: dict[str, str]) -> Row:
    return {
        "op": "training_step",
        "implementation": name,
        "device": problem.device,
        "size": problem.model,
        "dtype": problem.dtype_name,
        "batch": problem.batch,
        "chunks": [problem.forward_batch_rows, problem.backward_batch_rows, problem.decode_images],
        "toy": problem.toy,
        "gradient_error": errors[name],
        "fault": faults.get(name),
    }


def _figures(problem: Problem, name: str, step: Step, samples: list[float], sampling: int | None) -> Row:
    median, work = statistics.median(samples), flops(step)
    resident, stages = memory(step, problem.device)
    expected, unpredicted = _predicted(problem, name)
    peak = best_flops(problem)
    return {
        "median_seconds": median,
        "spread": spread(samples),
        "samples": samples,
        "flops": work,
        "flops_per_second": work / median,
        "best_flops_per_second": peak,
        "utilisation": work / median / peak if peak else None,
        "resident_bytes": resident,
        "peak_bytes": max(stages.values()),
        "stage_bytes": stages,
        "predicted_stage_bytes": expected,
        "predicted_bytes": max(expected.values()) if expected else None,
        "unpredicted": unpredicted,
        "training_step_flops": None if sampling is None else whole_step_flops(work, sampling, problem.batch),
    }


def _predicted(problem: Problem, name: str) -> tuple[dict[str, int] | None, str | None]:
    """The prediction, or why there is none: what is measured does not depend on it."""
    if name == PUBLISHED:
        return None, "nobody plans the published way"
    try:
        return prediction.stage_bytes(problem, name), None
    except (UserError, NotImplementedError) as error:
        # A model or reward that cannot be simulated, or an operator that PyTorch does not have on the meta device.
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def _compare(rows: list[Row]) -> None:
    """Ratios against the published way; a whole training step's FLOPs against the joint executor's."""
    by_name = {row["implementation"]: row for row in rows if row["fault"] is None}
    published, joint = by_name.get(PUBLISHED), by_name.get("joint")
    for row in by_name.values():
        row["times_published"] = published and published["median_seconds"] / row["median_seconds"]
        row["flops_of_published"] = published and row["flops"] / published["flops"]
        row["peak_of_published"] = published and row["peak_bytes"] / published["peak_bytes"]
        whole = row["training_step_flops"]
        row["training_step_of_joint"] = (
            {ratio: count / joint["training_step_flops"][ratio] for ratio, count in whole.items()}
            if joint and whole
            else None
        )


def whole_step_flops(step: int, trajectory: int, batch: int) -> dict[str, float]:
    """FLOPs of an optimizer step and its share of a refill, by replay ratio.

    Args:
        step: FLOPs of the gradient of `batch` samples; trajectory: of sampling one trajectory.
    """
    return {str(ratio): step + trajectory * batch / ratio for ratio in REPLAY_RATIOS}


def best_flops(problem: Problem) -> float | None:
    """What the device can do at best, in FLOP/s: a GPU's specified throughput, a CPU's fastest matrix product."""
    if problem.device == "cuda":
        return prediction.peak_flops(problem)
    return product_flops(problem.dtype, problem.toy)


@cache
def product_flops(dtype: torch.dtype, toy: bool) -> float:
    """FLOP/s of the fastest of ten products of square matrices, on the CPU with the threads that PyTorch has."""
    size = 64 if toy else 1024
    one, other = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def sampling_flops(problem: Problem) -> int:
    """FLOPs of one trajectory, counted on one."""
    ours = Ours(problem)
    sampler = Sampler(ours.backbone, ours.schedule, guidance_scale=problem.guidance_scale, batch_size=1)
    with _counter() as counter:
        sampler.sample(ours.batch.prompts[:1], ours.seeds[:1])
    return counter.get_total_flops()


def flops(step: Step) -> int:
    """Of matrix products, convolutions and attention in one run; recomputed ones count again."""
    step.prepare()
    with _counter() as counter:
        step.call()
    return counter.get_total_flops()


def memory(step: Step, device: str) -> tuple[int, dict[str, int]]:
    """Bytes of the weights on the device before a run, and the most that is allocated in each stage, those included.

    By PyTorch's own account, the CUDA allocator's or the profiler's allocation events; what other ways to run the step
    keep on the device does not count.
    """
    resident, stages = _cuda_stages(step) if device == "cuda" else _cpu_stages(step)
    step.watch(lambda name: None)
    return resident, {name: resident + live for name, live in stages.items()}


def resident_bytes(modules: Iterable[nn.Module], device: str) -> int:
    """Bytes of the storages of parameters and buffers on `device`, each once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device)
    }
    return sum(storages.values())


def _cuda_stages(step: Step) -> tuple[int, dict[str, int]]:
    resident = _settle(step, "cuda")
    found: dict[str, int] = {}
    current = ""

    def close() -> None:
        torch.cuda.synchronize()
        found[current] = max(found.get(current, 0), torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    def begin(name: str) -> None:
        nonlocal current
        close()
        current = name

    step.watch(begin)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.call()
    close()
    return resident, _named(found)


def _settle(step: Step, device: str) -> int:
    """Run once, so that weights which move are where a run leaves them; the bytes that are on the device then."""
    step.prepare()
    step.call()
    step.prepare()
    return resident_bytes(step.modules, device)


def _cpu_stages(step: Step) -> tuple[int, dict[str, int]]:
    def begin(name: str) -> None:
        with torch.profiler.record_function(_MARK + name):
            pass

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        # The profiler misses the end of what was allocated before it began: weights that move have to move once.
        resident = _settle(step, "cpu")
        step.watch(begin)
        begin("")
        step.call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" or _MARK in e.name()]
    events.sort(key=lambda event: event.start_ns())
    begun = next(number for number, event in enumerate(events) if event.name() == _MARK)
    found, live, current = {"": 0}, 0, ""
    for event in events[begun:]:
        if event.name() == "[memory]":
            live += event.nbytes()
        else:
            current = event.name().removeprefix(_MARK)
            found.setdefault(current, live)
        found[current] = max(found[current], live)
    return resident, _named(found)


def _named(stages: dict[str, int]) -> dict[str, int]:
    """What comes before the first stage has a name belongs to it."""
    unnamed = stages.pop("")
    first = next(iter(stages))
    return {**stages, first: max(stages[first], unnamed)}


def _counter() -> FlopCounterMode:
    # PyTorch's table has the attention of every device but the CPU.
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(nullcontext[None]):
    """In place of the counter's tracker, whose hooks refuse a checkpointed block in `torch.autograd.grad`."""

    parents = frozenset({"Global"})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: int = sdpa_backward_flop_count(gradient, query, key, value)
    return count
