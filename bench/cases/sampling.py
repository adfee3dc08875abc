"""What do the switches of sampling do to its speed: merged LoRA, batch size, channels_last, compiled blocks?

Two guided denoising steps of the embedded model's policy. The LoRA is merged before: "merging" is what that costs, once
a refill. "adapter" is sampling without any switch, "batch-N" the merged sampler at another batch size,
"attention-scores" the merged one with diffusers' older attention, which computes the whole matrix of scores.
Ratios are per sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import tables
from harness.benchmark import Benchmark, Choice, Group, Prepared, Row, ratio
from harness.meters import Counter
from harness.tables import Column
from harness.timing import TOY_PACE, Pace, Subject
from torch import Tensor

STEPS, BATCH, RANK = 2, 4, 8
BASELINE, MERGING, SCORES = "adapter", "merging", "attention-scores"
SWITCHES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "merged": {},
    SCORES: {},
    "channels_last": {"channels_last": True},
    "regional": {"compilation": "regional"},
    "cuda-graphs": {"compilation": "cuda-graphs"},
}
BATCHES = (1, 8)
PACE = Pace(0.0, 3)
ALLOWANCE = 1e-4
"""Relative L2 error of x_0 against the adapter's in float32, beyond twice that of the adapter in the same precision."""


def groups(choice: Choice) -> Iterator[Group]:
    device = choice.device
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        fields = {"direction": "forward", "device": device, "size": "shapes", "dtype": name, "noise": "drawn"}
        yield Group(f"{device}-{name}", tuple(_names(device, dtype)), fields, dtype)


def _names(device: str, dtype: torch.dtype) -> list[str]:
    names = [*SWITCHES, *(f"batch-{size}" for size in BATCHES), MERGING]
    if device == "cuda":
        return names
    if dtype == torch.bfloat16:
        # Of interest where the LoRA has another dtype than the network.
        return [BASELINE, "merged", SCORES, "channels_last", MERGING]
    return [name for name in names if name != "cuda-graphs"]


def prepare(group: Group, toy: bool) -> Prepared:
    """Every variant, its x_0 compared with the adapter's in float32."""
    calls = {name: _call(group.device, group.problem, name) for name in group.contenders}
    truth = _call(group.device, torch.float32, BASELINE)()
    budget = 2 * _error(calls[BASELINE](), truth) + ALLOWANCE
    first, faults = {}, {}
    for name, call in calls.items():
        started = time.perf_counter()
        x0 = call()
        first[name] = time.perf_counter() - started
        if name != MERGING and not (error := _error(x0, truth)) <= budget:
            faults[name] = f"x_0 has relative error {error:.1e}, budget {budget:.1e}"
    subjects = {name: Subject(lambda _, call=call: call()) for name, call in calls.items() if name not in faults}

    def figures(name: str, medians: dict[str, float]) -> Row:
        per_sample = {other: seconds / _batch(other) for other, seconds in medians.items() if other != MERGING}
        found: Row = {
            "shape": [_batch(name), 4, 16, 16],
            "times_eager": None if name == MERGING else ratio(per_sample, BASELINE, name),
            "times_merged": None if name == MERGING else ratio(per_sample, "merged", name),
            "first_seconds": first[name],
        }
        if name not in ("regional", "cuda-graphs"):
            with Counter() as counter:
                subjects[name].call(None)
            found["operators"] = counter.operators
        return found

    return Prepared(subjects, faults, TOY_PACE if toy else PACE, figures)


def _error(x0: Tensor, truth: Tensor) -> float:
    n = min(len(x0), len(truth))
    return float((x0[:n] - truth[:n]).norm() / truth[:n].norm())


def _batch(name: str) -> int:
    return int(name.removeprefix("batch-")) if name.startswith("batch-") else BATCH


def _call(device: str, dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    """A network of its own, and two steps of the policy's trajectories through it: their x_0."""
    # Only now: diffusers takes seconds, and nothing else here should wait for it.
    from diffusers.models.attention_processor import AttnProcessor

    from sqdf_fast.backbone import Backbone
    from sqdf_fast.engine.noise import Stream, sample_seeds
    from sqdf_fast.engine.sampler import Sampler
    from sqdf_fast.families import load_family

    family = load_family("shapes", device=torch.device(device), dtype=dtype)
    backbone = Backbone(family, rank=RANK, consistency_lora=family.default_consistency_lora())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # A fresh LoRA adds zero: nothing would be compared.
        for parameter in backbone.policy_parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    if name == SCORES:
        family.network.set_attn_processor(AttnProcessor())
    settings = SWITCHES.get(name, {})
    sampler = Sampler(
        backbone, family.schedule(STEPS, 1.0), guidance_scale=4.0, batch_size=_batch(name), merge_lora=False, **settings
    )
    prompts, seeds = ["a red star"] * _batch(name), sample_seeds(0, Stream.REFILL, 0, _batch(name))
    if name == MERGING:
        return partial(_merge, backbone)
    if name == BASELINE:
        return lambda: sampler.sample(prompts, seeds).x0
    # Merged for as long as the call exists: what runs as the reference is the policy.
    merged = backbone.merged("policy")
    merged.__enter__()
    return lambda _=merged: sampler.sample(prompts, seeds, role="reference").x0


def _merge(backbone: Any) -> Tensor:
    with backbone.merged("policy"):
        return torch.empty(0)


COLUMNS = (
    Column("variant", "implementation", text=True),
    Column("precision", "dtype"),
    Column("time of two steps", "median_seconds", tables.duration),
    Column("spread", "spread", ".0%"),
    Column("x adapter", "times_eager", ".2f"),
    Column("x merged", "times_merged", ".2f"),
    Column("operators", "operators", ","),
)

BENCHMARK = Benchmark(
    name="sampling",
    page="sampling.md",
    groups=groups,
    prepare=prepare,
    columns=COLUMNS,
    tables=lambda rows: [tables.table(COLUMNS, rows)],
)
