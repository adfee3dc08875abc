"""What do the switches of sampling do to its speed: merged LoRA, batch size, channels_last, compiled blocks?

Two guided denoising steps of the embedded world's policy, every variant of a row in turn. The LoRA is merged before:
"merging" is what that costs, once a refill. "eager" is the way without any switch, the LoRA as an adapter; "batch-N" is
the merged sampler at another batch size. "attention-scores" is the merged one with diffusers' older attention, which
writes out the matrix of scores, in place of scaled_dot_product_attention. Ratios are a sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from fused_ops import summary
from fused_ops.timing import TOY_PACE, Pace, Subject, interleave, peak_bytes, play, playback_time
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sqdf_fast.backbone import Backbone
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.families import load_family

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
PACE = Pace(0.0, 3, 0.0)
DTYPES = (torch.float32, torch.bfloat16)
ALLOWANCE = 1e-4
"""Relative L2 error of x_0 against the adapter's in float32, beyond twice that of the adapter in the same precision."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("bench_device")
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [(device, dtype) for device in there if wanted in ("all", device) for dtype in DTYPES]
    cases = [(*row, name) for row in rows for name in _names(*row)]
    metafunc.parametrize(("device", "dtype", "name"), [_parameter(*case) for case in cases])


def _names(device: str, dtype: torch.dtype) -> list[str]:
    names = [*SWITCHES, *(f"batch-{size}" for size in BATCHES), MERGING]
    if device == "cuda":
        return names
    if dtype == torch.bfloat16:
        # Of interest where the LoRA is of another type than the network.
        return [BASELINE, "merged", SCORES, "channels_last", MERGING]
    return [name for name in names if name != "cuda-graphs"]


def _parameter(device: str, dtype: torch.dtype, name: str) -> Any:
    row = f"{device}-{str(dtype).removeprefix('torch.')}"
    mark = pytest.mark.benchmark(timer=playback_time, group=f"sampling-{row}")
    return pytest.param(device, dtype, name, id=f"{row}-{name}", marks=mark)


def test_sampling(device: str, dtype: torch.dtype, name: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    toy = bool(pytestconfig.getoption("toy"))
    samples, figures, faults = _measured(device, dtype, toy)
    if name in faults:
        pytest.fail(f"no parity, no number: {faults[name]}", pytrace=False)
    a_sample = {other: statistics.median(taken) / _batch(other) for other, taken in samples.items() if other != MERGING}
    row = {
        "op": "sampling",
        "implementation": name,
        "direction": "forward",
        "device": device,
        "size": "shapes",
        "shape": [_batch(name), 4, 16, 16],
        "dtype": str(dtype).removeprefix("torch."),
        "noise": "drawn",
        "toy": toy,
        "median_seconds": statistics.median(samples[name]),
        "spread": summary.spread(samples[name]),
        "bytes_moved": 0,
        "bytes_formula": "",
        "gb_per_second": None,
        "copy_gb_per_second": None,
        "copy_fraction": None,
        "times_eager": None if name == MERGING else summary.ratio(a_sample, BASELINE, name),
        "times_compile": None,
        "times_merged": None if name == MERGING else summary.ratio(a_sample, "merged", name),
        **figures[name],
    }
    benchmark.extra_info.update(row)
    benchmark.pedantic(play(samples[name]), rounds=len(samples[name]))


Measured = tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, str]]


@cache
def _measured(device: str, dtype: torch.dtype, toy: bool) -> Measured:
    """Of every variant: samples in turns; seconds of the first call, operators and bytes of one; faults."""
    calls = {name: _call(device, dtype, name) for name in _names(device, dtype)}
    figures: dict[str, dict[str, float]] = {}
    faults = {}
    truth = _call(device, torch.float32, BASELINE)()
    budget = 2 * _error(calls[BASELINE](), truth) + ALLOWANCE
    for name, call in calls.items():
        started = time.perf_counter()
        x0 = call()
        figures[name] = {"first_seconds": time.perf_counter() - started}
        if name != MERGING and not (error := _error(x0, truth)) <= budget:
            faults[name] = f"x_0 has relative error {error:.1e}, budget {budget:.1e}"
    subjects = {name: Subject(lambda _, call=call: call()) for name, call in calls.items() if name not in faults}
    samples = interleave(subjects, device, TOY_PACE if toy else PACE)
    for name, subject in subjects.items():
        figures[name]["peak_bytes"] = peak_bytes(subject, device)
        if name not in ("regional", "cuda-graphs"):
            with _Operators() as counter:
                subject.call(None)
            figures[name]["operators"] = counter.count
    return samples, figures, faults


def _error(x0: Tensor, truth: Tensor) -> float:
    n = min(len(x0), len(truth))
    return float((x0[:n] - truth[:n]).norm() / truth[:n].norm())


class _Operators(TorchDispatchMode):
    """Counts what runs, views left out: on a GPU, about the kernels launched."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), keywords: Any = None) -> Any:
        self.count += not function.is_view
        return function(*given, **(keywords or {}))


def _batch(name: str) -> int:
    return int(name.removeprefix("batch-")) if name.startswith("batch-") else BATCH


def _call(device: str, dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    """A network of its own, and two steps of the policy's trajectories through it: their x_0."""
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


def _merge(backbone: Backbone) -> Tensor:
    with backbone.merged("policy"):
        return torch.empty(0)
