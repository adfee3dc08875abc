"""The speed switches that a plan sets, each with its reason: as measured, and off where nothing was measured.

The measurements are those of docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqdf_fast.config import Config

SWITCHES = ("sampling.merge_lora", "sampling.channels_last", "sampling.compile", "replay.store", "execution.attention")


@dataclass(frozen=True)
class Switch:
    """A speed setting, its planned value and the reason."""

    key: str
    value: Any
    reason: str


def merging(config: Config, quantization: str) -> tuple[bool, ...]:
    """Values of sampling.merge_lora to search."""
    if config.policy.kind == "full":
        return (config.sampling.merge_lora,)
    # Quantised layers always run their adapter, and CUDA graphs hold the addresses of weights.
    if quantization != "none" or config.sampling.compile == "cuda-graphs":
        return (False,)
    return (True, False) if config.sampling.merge_lora else (False,)


def fixed(config: Config, keep: Mapping[str, Any]) -> dict[str, Any]:
    """The switches that are not searched: off, or as the user set them.

    Compiled blocks allocate what the simulation does not see, and their gain is not measured where a budget matters;
    NHWC weights are slower on a CPU and not measured elsewhere.
    """
    values = {"sampling.channels_last": False, "sampling.compile": "none"}
    values["execution.attention"] = config.execution.attention
    return {**values, **{key: keep[key] for key in values if key in keep}}


def explained(config: Config, settings: Mapping[str, Any], keep: Mapping[str, Any], on_cpu: bool) -> tuple[Switch, ...]:
    """Every switch of a plan with its reason."""
    values = {**settings, "replay.store": config.replay.store}
    reasons = {
        "sampling.merge_lora": _of_merging(config, settings),
        "sampling.channels_last": (
            "slower on a CPU: 0.97 of the steps a second in float32, 0.89 in bfloat16"
            if on_cpu
            else "no gain measured on a GPU, whose GroupNorm converts back to NCHW"
        ),
        "sampling.compile": (
            "between 1.00 and 1.41 of the steps a second on a CPU for 9 to 25 s of compilation: no sure gain"
            if on_cpu
            else "no gain measured on a GPU, and compiled blocks allocate what is not simulated"
        ),
        "replay.store": "changes the result, so it is not the plan's to set",
        "execution.attention": "xformers runs on CUDA alone" if on_cpu else "no gain of another backend measured",
    }
    reasons.update({key: "as given" for key in SWITCHES if key in keep})
    return tuple(Switch(key, values[key], reasons[key]) for key in SWITCHES)


def _of_merging(config: Config, settings: Mapping[str, Any]) -> str:
    if config.policy.kind == "full":
        return "there is no LoRA"
    if settings["execution.quantization"] != "none":
        return "quantised layers are not merged"
    if settings["sampling.merge_lora"]:
        return "no adapter runs, and the copy of its layers fits"
    if not config.sampling.merge_lora:
        return "as configured"
    if settings["sampling.compile"] == "cuda-graphs":
        return "CUDA graphs need weights that stay in their place"
    return "the copy of its layers does not fit, or its memory is better spent on larger chunks"
