"""Measures a problem: parity of every way to run its step, FLOPs, and memory by stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from harness.benchmark import Prepared, Row, ratio
from harness.meters import Counter, stage_peaks
from harness.timing import Pace, Subject
from torch import nn

from cases.training_step import prediction, setups
from cases.training_step.problem import PUBLISHED, Problem, parity_problem
from cases.training_step.setups import Ours, Step
from sqdf_fast.config import PRESETS
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError

PACE = {"cpu": Pace(0.0, 3, uncounted=0), "cuda": Pace(0.0, 7, uncounted=0)}
TOY_PACE = Pace(0.0, 2, uncounted=0)

ALLOWANCE = 1e-6
"""Relative error of a gradient beyond twice that of the published way in the same precision, float32."""
CEILING = 1e-3
"""Relative error that rounding can explain at all: the published way itself has to stay below it."""

REPLAY = PRESETS["shapes"]["replay"]["steps_per_refill"]
REPLAY_RATIOS = (1, REPLAY)
"""Optimizer steps a refill of as many trajectories as a step has samples: 1, and the shipped preset's."""


def prepare(problem: Problem) -> Prepared:
    """Every way to run the step that has parity."""
    steps = setups.make(problem)
    judged = parity_problem(problem)
    faults, errors = parity(judged, steps if judged == problem else setups.make(judged))
    sound = {name: step for name, step in steps.items() if name not in faults}
    subjects = {name: Subject(lambda _, step=step: step.call(), step.prepare) for name, step in sound.items()}
    pace = TOY_PACE if problem.toy else PACE[problem.device]

    def figures(name: str, medians: Mapping[str, float]) -> Row:
        return _figures(problem, name, sound[name], medians)

    return Prepared(subjects, faults, pace, figures, compare, lambda name: {"gradient_error": errors[name]})


def parity(problem: Problem, steps: dict[str, Step]) -> tuple[dict[str, str], dict[str, float]]:
    """Why a way's gradient is wrong, by name, and every way's relative L2 error.

    The exact gradient is the staged executor's in float64. Without the published way's parity nothing has figures.
    """
    with torch.backends.cudnn.flags(allow_tf32=False):
        truth = Ours(problem, torch.float64).step("staged + checkpointing").gradient()
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


def _figures(problem: Problem, name: str, step: Step, medians: Mapping[str, float]) -> Row:
    median = medians[name]
    work, resident, stages = memory(step, problem.device)
    expected, unpredicted = predicted(problem, name)
    best = best_flops(problem)
    sampling = sampling_flops(problem) if problem.model == "shapes" else None
    return {
        "times_published": ratio(medians, PUBLISHED, name),
        "flops": work,
        "flops_per_second": work / median,
        "best_flops_per_second": best,
        "utilisation": work / median / best if best else None,
        "resident_bytes": resident,
        "peak_bytes": max(stages.values()),
        "stage_bytes": stages,
        "predicted_stage_bytes": expected,
        "predicted_bytes": max(expected.values()) if expected else None,
        "unpredicted": unpredicted,
        "training_step_flops": None if sampling is None else whole_step_flops(work, sampling, problem.batch),
    }


def predicted(problem: Problem, name: str) -> tuple[dict[str, int] | None, str | None]:
    """The predicted bytes of each stage, or why a prediction is missing, which does not stop the measurement."""
    if name == PUBLISHED:
        return None, "nobody plans the published way"
    try:
        return prediction.stage_bytes(problem, name), None
    except (UserError, NotImplementedError) as error:
        # A model or reward that cannot be simulated, or an operator that PyTorch does not have on the meta device.
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def compare(rows: dict[str, Row]) -> None:
    """FLOPs and peak relative to the published way; a whole training step's FLOPs relative to the joint executor's."""
    published, joint = rows.get(PUBLISHED), rows.get("joint")
    for row in rows.values():
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
        step: FLOPs of the gradient of `batch` samples.
        trajectory: FLOPs of sampling one trajectory.
        batch: samples of the step.
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


@cache
def sampling_flops(problem: Problem) -> int:
    """FLOPs of one trajectory, counted on one."""
    ours = Ours(problem)
    sampler = Sampler(ours.backbone, ours.schedule, guidance_scale=problem.guidance_scale, batch_size=1)
    with Counter() as counter:
        sampler.sample(ours.batch.prompts[:1], ours.seeds[:1])
    return counter.flops


def flops(step: Step) -> int:
    """FLOPs of matrix products, convolutions and attention in one run; checkpointed ones count again."""
    step.prepare()
    with Counter() as counter:
        step.call()
    return counter.flops


def memory(step: Step, device: str) -> tuple[int, int, dict[str, int]]:
    """FLOPs of a run, bytes of the weights on the device before it, and the most allocated in each stage with them.

    What other ways to run the step keep on the device does not count.
    """
    work = resident = 0

    def settle() -> None:
        # Weights that move have to be where a run leaves them.
        nonlocal work, resident
        work = flops(step)
        step.prepare()
        resident = resident_bytes(step.modules, device)

    stages = stage_peaks(step.call, device, step.watch, settle)
    step.watch(lambda name: None)
    # What comes before the first stage has a name belongs to it.
    unnamed = stages.pop("")
    first = next(iter(stages))
    stages[first] = max(stages[first], unnamed)
    return work, resident, {name: resident + live for name, live in stages.items()}


def resident_bytes(modules: Iterable[nn.Module], device: str) -> int:
    """Bytes of the storages of parameters and buffers on `device`, each once."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device)
    }
    return sum(storages.values())
