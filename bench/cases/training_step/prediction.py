"""What the planner predicts for a problem, and what the device can do at best, where these are known."""

from __future__ import annotations

import re
from functools import cache

import torch

from cases.training_step import setups
from cases.training_step.problem import Problem
from sqdf_fast import shapes
from sqdf_fast.plan.device import DEVICES, find_device
from sqdf_fast.plan.memory import CUDA_GRANULARITY
from sqdf_fast.plan.simulate import Simulation
from sqdf_fast.plan.workspace import on_cpu, on_cuda
from sqdf_fast.rewards import reward_from_config


def stage_bytes(problem: Problem, name: str) -> dict[str, int]:
    """Bytes at the worst moment of each stage: the planner's simulation of one of OURS at the settings measured."""
    steps = _simulation(problem).run(setups.execution(problem, name), problem.batch)
    return {stage: count.peak_bytes for stage, count in steps.stages.items() if stage != "optimizer"}


def peak_flops(problem: Problem) -> float | None:
    """Specified dense bfloat16 throughput of the GPU in FLOP/s; None on a CPU and for a GPU not in the table."""
    if problem.device != "cuda" or problem.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    found = find_device(name, 0).name
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return DEVICES[found].flops if set(found.lower().split()) <= words else None


@cache
def _simulation(problem: Problem) -> Simulation:
    family = setups.architecture(problem, torch.device("meta"))
    return Simulation(
        setups.configuration(problem),
        family,
        reward_from_config(problem.reward, device="meta", dtype=problem.dtype),
        workspace=on_cuda if problem.device == "cuda" else on_cpu,
        granularity=CUDA_GRANULARITY if problem.device == "cuda" else 1,
        # Only the shape of a file that is here matters; of another, that of the published LoRAs is taken.
        consistency=str(shapes.consistency_lora_folder()) if problem.model == "shapes" else "published",
    )
