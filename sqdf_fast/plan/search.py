"""The fastest way to run a step inside a budget, found from a few simulated steps of one sample.

A stage's activations grow in proportion to its chunk, so one sample's simulation bounds every chunk size; the plan that
wins is then simulated whole, at two batch sizes, and its peak extended in a straight line to the real one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from types import MappingProxyType
from typing import Any

from sqdf_fast.config import Config, Execution
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.plan import switches
from sqdf_fast.plan.device import Device
from sqdf_fast.plan.memory import StageCount, scaled
from sqdf_fast.plan.simulate import Simulation, Steps

SAMPLES_AT_ONCE = (1, 2, 4, 8)
SAMPLED_AT_ONCE = (1, 2, 4, 8, 16)
SLACK = 1.002
"""A larger chunk has to be faster by more than this factor to be worth its memory."""
CPU_PARAMETERS_A_SECOND = 4e8
"""Of an AdamW step with states on the CPU: bound by memory, about 20 bytes a parameter over eight channels' worth."""

_WAY = (
    *("execution.executor", "execution.gradient_checkpointing", "execution.offload", "execution.quantization"),
    *("optimizer.states", "sampling.merge_lora"),
)
_OFFLOAD, _STATES = "execution.offload", "optimizer.states"
_NETWORK_STAGES = ("transition", "look-ahead", "look-ahead vjp", "policy vjp")
_LARGE_STATES = 2**27
"""Bytes of optimizer states from which it is worth asking whether they belong on the CPU."""
_LATENTS_KEPT = 12
"""Latent-sized float32 tensors that the staged executor keeps a sample at most, between and in its stages."""


@dataclass(frozen=True)
class Profile:
    """What one sample's step takes, for one state of the frozen weights.

    Attributes:
        quantization: of the frozen network.
        stages: by executor and whether blocks are checkpointed.
        weights: on the device when all are resident; staged_weights: by stage, when parts come and go.
        uploads: bytes that then come, by stage.
        rows: network rows a sample; latent: numbers of one; trained: elements; trained_bytes: theirs.
        state_bytes: of the optimizer's states, wherever they are.
    """

    quantization: str
    stages: dict[str, list[dict[str, StageCount]]]
    weights: int
    staged_weights: dict[str, int]
    uploads: dict[str, int]
    rows: int
    latent: int
    trained: int
    trained_bytes: int
    state_bytes: int


def profile(simulation: Simulation, quantization: str) -> Profile:
    """Simulate one sample: both executors, with gradient checkpointing everywhere and nowhere."""
    runs = {executor: [profiled(simulation, executor, c) for c in (False, True)] for executor in ("staged", "joint")}
    stages = {executor: [steps.stages for steps in pair] for executor, pair in runs.items()}
    checkpointed = stages["staged"][True]
    trained, trained_bytes = simulation.trained()
    return Profile(
        quantization,
        stages,
        weights=max(stage.at_peak["weights"] for stage in stages["joint"][False].values()),
        staged_weights={name: stage.at_peak.get("weights", 0) for name, stage in checkpointed.items()},
        uploads=runs["staged"][True].uploads,
        rows=simulation.rows,
        latent=prod(simulation.family.latent_shape),
        trained=trained,
        trained_bytes=trained_bytes,
        state_bytes=next(iter(checkpointed.values())).at_peak["optimizer"],
    )


def profiled(simulation: Simulation, executor: str, checkpointed: bool) -> Steps:
    """One of a profile's runs. The staged ones sample too: one with merged weights, the other offloads instead."""
    offloaded = executor == "staged" and checkpointed
    return simulation.run(
        Execution(
            executor=executor,
            forward_batch_rows=simulation.rows,
            backward_batch_rows=simulation.rows,
            gradient_checkpointing=ALL_GROUPS if checkpointed else (),
            offload="staged" if offloaded else "none",
        ),
        1,
        sampled=1 if executor == "staged" else 0,
        merged=not offloaded,
        optimizer=simulation.config.optimizer.model_copy(update={"states": "device"}),
    )


@dataclass(frozen=True)
class Choice:
    """One way to run a step, and what it is estimated to take.

    Attributes:
        settings: dotted configuration keys to values.
        peaks: bytes by stage; seconds: by stage, of a whole optimizer step and its share of the sampling.
    """

    settings: dict[str, Any]
    peaks: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> int:
        """Of the worst stage."""
        return max(self.peaks.values())

    @property
    def total_seconds(self) -> float:
        """Of one optimizer step with its share of the sampling."""
        return sum(self.seconds.values())

    @property
    def way(self) -> tuple[Any, ...]:
        """The settings but for the chunk sizes."""
        return tuple(str(self.settings[key]) for key in _WAY)

    @property
    def execution(self) -> Execution:
        """The settings' section."""
        values = {key.partition(".")[2]: value for key, value in self.settings.items() if key.startswith("execution.")}
        return Execution(**values)


def choices(
    profile: Profile, config: Config, device: Device, keep: Mapping[str, Any] = MappingProxyType({})
) -> list[Choice]:
    """Every combination of the dimensions, each chunk size apart.

    Args:
        keep: dotted configuration keys to values that every choice has.
    """
    found = _choices(profile, config, device, keep)
    # Where a size is kept, the choices that differed in it are the same.
    return list({str(choice.settings): choice for choice in found}.values())


def fastest(found: Iterable[Choice], budget: int) -> Choice | None:
    """The least time that fits ``budget`` bytes, with no larger chunks than that time needs."""
    fitting = [choice for choice in found if choice.peak_bytes <= budget]
    if not fitting:
        return None
    best = min(fitting, key=lambda choice: choice.total_seconds)
    alike = (c for c in fitting if c.way == best.way and c.total_seconds <= best.total_seconds * SLACK)
    return min(alike, key=lambda choice: (choice.peak_bytes, choice.total_seconds))


def _choices(profile: Profile, config: Config, device: Device, keep: Mapping[str, Any]) -> Iterator[Choice]:
    # bitsandbytes holds int8 weights twice: they cannot come and go, and the configuration refuses it. CUDA graphs hold
    # the addresses of weights.
    still = profile.quantization == "int8" or keep.get("sampling.compile") == "cuda-graphs"
    offloads = ("none",) if still else ("none", "staged")
    states = ("device",) if config.optimizer.kind == "paged_adamw8bit" else ("device", "cpu")
    if config.optimizer.states == "cpu":
        states = ("cpu",)
    elif profile.state_bytes < _LARGE_STATES:
        states = ("device",)
    offloads, states = (_kept(keep, key, v) for key, v in ((_OFFLOAD, offloads), (_STATES, states)))
    executors = _kept(keep, "execution.executor", ("staged", "joint"))
    # 0 is a single row, half a guided sample.
    at_once = SAMPLES_AT_ONCE if profile.rows == 1 else (0, *SAMPLES_AT_ONCE)
    sampled_at_once = _kept(keep, "sampling.batch_size", SAMPLED_AT_ONCE)
    merging = _kept(keep, "sampling.merge_lora", switches.merging(config, profile.quantization))
    for place, sampled, merged in product(states, sampled_at_once, merging):
        common = _Common(profile, config, device, place, sampled, merged, keep)
        for offload, network, rest in product(offloads, (False, True), (False, True)):
            for samples, images in product(at_once, SAMPLES_AT_ONCE):
                if "staged" in executors and images <= max(samples, 1) and samples <= config.optimizer.batch_size:
                    yield common.staged(samples, images, network, rest, offload)
        for recomputed, samples in product((False, True), SAMPLES_AT_ONCE):
            if "joint" in executors and "none" in offloads and samples <= config.optimizer.batch_size:
                yield common.joint(samples, recomputed)


def _kept(keep: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (keep[key],) if key in keep else values


@dataclass(frozen=True)
class _Common:
    """What the choices of one place of the states and one sampling batch have in common."""

    profile: Profile
    config: Config
    device: Device
    states: str
    sampled: int
    merged: bool
    keep: Mapping[str, Any]

    def staged(self, samples: int, images: int, network: bool, rest: bool, offload: str) -> Choice:
        """samples: of a network call, 0 for a single row; network, rest: recomputed."""
        profile, batch = self.profile, self.config.optimizer.batch_size
        kept = 4 * _LATENTS_KEPT * profile.latent * batch
        recomputed = (*(("network",) if network else ()), *(("decoder", "reward") if rest else ()))
        execution = self._execution("staged", samples, images, recomputed, offload)
        peaks, seconds = self._sampling(execution)
        for name in (*_NETWORK_STAGES, "reward", "optimizer"):
            parts = {"decoder", "reward"} if name == "reward" else {"network"}
            stage = profile.stages["staged"][parts <= set(execution.gradient_checkpointing)].get(name)
            if stage is None:
                continue
            chunk = _chunk(name, execution, profile.rows)
            peaks[name] = self._peak(name, stage, chunk, offload) + (kept if name != "optimizer" else 0)
            seconds[name] = self._seconds(name, stage, batch, chunk, offload)
        return Choice(self._settings(execution), peaks, seconds)

    def joint(self, samples: int, recomputed: bool) -> Choice:
        """samples: of a micro-batch."""
        execution = self._execution("joint", samples, 1, ALL_GROUPS if recomputed else (), "none")
        peaks, seconds = self._sampling(execution)
        everything = set(ALL_GROUPS) <= set(execution.gradient_checkpointing)
        for name, stage in self.profile.stages["joint"][everything].items():
            chunk = 1 if name == "optimizer" else execution.micro_batch
            peaks[name] = self._peak(name, stage, chunk, "none")
            seconds[name] = self._seconds(name, stage, self.config.optimizer.batch_size, chunk, "none")
        return Choice(self._settings(execution), peaks, seconds)

    def _execution(
        self, executor: str, samples: int, images: int, recomputed: Iterable[str], offload: str
    ) -> Execution:
        if executor == "joint":
            samples = self.keep.get("execution.micro_batch", samples)
        rows = max(samples * self.profile.rows, 1)
        values: dict[str, Any] = {
            "executor": executor,
            "micro_batch": max(samples, 1),
            "forward_batch_rows": rows,
            "backward_batch_rows": rows,
            "decode_images": images,
            "gradient_checkpointing": tuple(recomputed),
            "offload": offload,
        }
        kept = {name.partition(".")[2]: value for name, value in self.keep.items() if name.startswith("execution.")}
        kept.pop("quantization", None)
        return Execution(**{**values, **kept})

    def _sampling(self, execution: Execution) -> tuple[dict[str, int], dict[str, float]]:
        replay, stages, offload = self.config.replay, self.profile.stages["staged"][not self.merged], execution.offload
        number = replay.refill / replay.steps_per_refill
        adapted, merged = (self.profile.stages["staged"][a]["sampling"].at_peak["activations"] for a in (True, False))
        at_once = {"sampling": self.sampled, "sampled images": execution.decode_images}
        peaks = {name: self._peak(name, stages[name], chunk, offload) for name, chunk in at_once.items()}
        if self.merged:
            # The copies of the weights do not grow with the batch.
            peaks["sampling"] -= max(merged - adapted, 0) * (self.sampled - 1)
        seconds = {"sampling": self._seconds("sampling", stages["sampling"], number, self.sampled, offload)}
        return peaks, seconds

    def _peak(self, name: str, stage: StageCount, chunk: float, offload: str) -> int:
        profile, at_peak = self.profile, stage.at_peak
        weights = profile.staged_weights.get(name, 0) if offload == "staged" else profile.weights
        gradients = at_peak.get("gradients", 0)
        if name in ("policy vjp", "forward", "backward", "optimizer"):
            gradients = max(gradients, profile.trained_bytes)
        states = profile.state_bytes if self.states == "device" else 0
        return weights + gradients + states + ceil(at_peak.get("activations", 0) * chunk)

    def _seconds(self, name: str, stage: StageCount, samples: float, chunk: float, offload: str) -> float:
        if name == "optimizer":
            return self._update_seconds(stage)
        whole = scaled(stage, samples)
        # Fewer, larger calls launch fewer kernels.
        seconds = self.device.seconds(replace(whole, operators=round(whole.operators / chunk)))
        uploads = self.profile.uploads.get(name, 0) if offload == "staged" else 0
        return seconds + self.device.upload_seconds(uploads)

    def _update_seconds(self, stage: StageCount) -> float:
        if self.states == "device":
            return self.device.seconds(stage)
        # Parameters and gradients come down, parameters go up.
        return (
            self.device.upload_seconds(3 * self.profile.trained_bytes) + self.profile.trained / CPU_PARAMETERS_A_SECOND
        )

    def _settings(self, execution: Execution) -> dict[str, Any]:
        values = execution.model_dump(exclude={"attention"})
        settings = {f"execution.{key}": value for key, value in values.items()}
        settings["execution.quantization"] = self.profile.quantization
        settings["execution.gradient_checkpointing"] = list(execution.gradient_checkpointing)
        settings |= {"optimizer.states": self.states, **self._sampling_settings()}
        return settings | switches.fixed(self.config, self.keep)

    def _sampling_settings(self) -> dict[str, Any]:
        return {"sampling.batch_size": self.sampled, "sampling.merge_lora": self.merged}


def whole(simulation: Simulation, choice: Choice, config: Config) -> Steps:
    """Simulate a choice at the batch size of ``config``: a small batch, extended in a straight line.

    From two chunks on: what the first leaves behind for the second is there once, not once a sample.
    """
    execution, batch = choice.execution, config.optimizer.batch_size
    optimizer = config.optimizer.model_copy(update={"states": choice.settings["optimizer.states"]})
    joint = execution.executor == "joint"
    unit = execution.micro_batch if joint else max(execution.backward_batch_rows // simulation.rows, 1)
    small, large = (min(unit * times, batch) for times in (2, 3))
    first = simulation.run(
        execution,
        small,
        sampled=choice.settings["sampling.batch_size"],
        merged=choice.settings["sampling.merge_lora"],
        optimizer=optimizer,
    )
    if small == batch:
        return first
    # What another chunk's samples leave in memory is the same whatever the networks hold while they run.
    before, after = (simulation.run(execution, size, optimizer=optimizer, hollow=True) for size in (small, large))
    stages = dict(first.stages)
    for name, stage in before.stages.items():
        more = after.stages[name].peak_bytes - stage.peak_bytes
        more += max(more, 0) * (batch - large) // (large - small)
        stages[name] = _extended(first.stages[name], more, 1 if name == "optimizer" else batch / small)
    return replace(first, stages=stages, samples=batch)


def _extended(stage: StageCount, more: int, work: float) -> StageCount:
    at_peak = {**stage.at_peak, "activations": stage.at_peak.get("activations", 0) + more}
    return replace(scaled(stage, work), peak_bytes=stage.peak_bytes + more, at_peak=at_peak)


def _chunk(name: str, execution: Execution, rows: int) -> float:
    """Samples whose activations a stage of the staged executor holds at a time."""
    if name in _NETWORK_STAGES:
        return (execution.backward_batch_rows if name.endswith("vjp") else execution.forward_batch_rows) / rows
    return execution.decode_images if name == "reward" else 1
