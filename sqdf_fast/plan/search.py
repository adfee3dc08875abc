"""The fastest way to run a step inside a budget, found from a few simulated steps of one sample.

A stage's activations grow in proportion to its chunk, so one sample's simulation bounds every chunk size; the winner is
then simulated at two batch sizes, and its peak extrapolated linearly to the full batch.
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
"""Factor by which a larger chunk has to be faster to be worth its memory."""
CPU_PARAMETERS_A_SECOND = 4e8
"""Of an AdamW step with states on the CPU: bound by memory, about 20 bytes a parameter over eight channels' worth."""

_WAY = (
    *("execution.executor", "execution.gradient_checkpointing", "execution.offload", "execution.quantization"),
    *("optimizer.states", "sampling.merge_lora"),
)
_NETWORK_STAGES = ("transition", "look-ahead", "look-ahead vjp", "policy vjp")
_LARGE_STATES = 2**27
"""Bytes of optimizer states from which their place on the CPU is considered."""
_LATENTS_KEPT = 12
"""Upper bound of the latent-sized float32 tensors that the staged executor keeps for each sample."""


@dataclass(frozen=True)
class Profile:
    """What the step of one sample takes.

    Attributes:
        quantization: of the frozen network.
        stages: by executor; a pair, without and with gradient checkpointing everywhere.
        weights: bytes on the device without offloading; staged_weights: by stage, with execution.offload=staged.
        uploads: bytes uploaded with execution.offload=staged, by stage.
        rows: network rows of a sample; latent: elements of its latent.
        trained: trained elements; trained_bytes: their bytes; state_bytes: of the optimizer's states.
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
    """One run of a profile. The staged ones sample too: one with the LoRA merged, the other with offloading."""
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
    """One way to run a step, with its estimated memory and time.

    Attributes:
        settings: dotted configuration keys to values.
        peaks: bytes by stage; seconds: by stage, of an optimizer step and its share of the sampling.
    """

    settings: dict[str, Any]
    peaks: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> int:
        """Peak of the largest stage."""
        return max(self.peaks.values())

    @property
    def total_seconds(self) -> float:
        """Seconds of one optimizer step with its share of the sampling."""
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
    """Every combination of executor, chunk sizes, gradient checkpointing, offloading, states and sampling.

    Args:
        keep: fixed settings, by dotted key.
    """
    states: tuple[str, ...] = ("device", "cpu")
    if config.optimizer.states == "cpu":
        states = ("cpu",)
    elif config.optimizer.kind == "paged_adamw8bit" or profile.state_bytes < _LARGE_STATES:
        states = ("device",)
    executions = list(_executions(profile, config, keep))
    found = (
        _Common(profile, config, device, states_on, sampled, merged, keep).choice(execution)
        for states_on in _kept(keep, "optimizer.states", states)
        for sampled in _kept(keep, "sampling.batch_size", SAMPLED_AT_ONCE)
        for merged in _kept(keep, "sampling.merge_lora", switches.merging(config, profile.quantization))
        for execution in executions
    )
    # A fixed setting makes choices that differed in it the same.
    return list({str(choice.settings): choice for choice in found}.values())


def fastest(found: Iterable[Choice], budget: int) -> Choice | None:
    """The choice of the least time that fits ``budget`` bytes, with the smallest chunks that reach it; None: none."""
    fitting = [choice for choice in found if choice.peak_bytes <= budget]
    if not fitting:
        return None
    best = min(fitting, key=lambda choice: choice.total_seconds)
    alike = (c for c in fitting if c.way == best.way and c.total_seconds <= best.total_seconds * SLACK)
    return min(alike, key=lambda choice: (choice.peak_bytes, choice.total_seconds))


def _executions(profile: Profile, config: Config, keep: Mapping[str, Any]) -> Iterator[Execution]:
    kept = {name.partition(".")[2]: value for name, value in keep.items() if name.startswith("execution.")}
    kept.pop("quantization", None)
    # bitsandbytes keeps int8 weights twice, so they cannot be offloaded; CUDA graphs hold the addresses of weights.
    fixed = profile.quantization == "int8" or keep.get("sampling.compile") == "cuda-graphs"
    offloads = _kept(keep, "execution.offload", ("none",) if fixed else ("none", "staged"))
    executors = _kept(keep, "execution.executor", ("staged", "joint"))
    sizes = [size for size in SAMPLES_AT_ONCE if size <= config.optimizer.batch_size]

    def execution(executor: str, samples: int, **values: Any) -> Execution:
        rows = max(samples * profile.rows, 1)
        chunks = {"micro_batch": max(samples, 1), "forward_batch_rows": rows, "backward_batch_rows": rows}
        return Execution(**{"executor": executor, **chunks, **values, **kept})

    if "staged" in executors:
        groups = ((), ("decoder", "reward"), ("network",), ALL_GROUPS)
        # 0 stands for a single row, half a guided sample.
        for offload, checkpointed, samples in product(offloads, groups, sizes if profile.rows == 1 else (0, *sizes)):
            for images in (size for size in SAMPLES_AT_ONCE if size <= max(samples, 1)):
                yield execution(
                    "staged", samples, decode_images=images, gradient_checkpointing=checkpointed, offload=offload
                )
    if "joint" in executors and "none" in offloads:
        for checkpointed, samples in product(((), ALL_GROUPS), sizes):
            yield execution("joint", kept.get("micro_batch", samples), gradient_checkpointing=checkpointed)


def _kept(keep: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (keep[key],) if key in keep else values


@dataclass(frozen=True)
class _Common:
    """What the choices with the same optimizer states and sampling settings have in common."""

    profile: Profile
    config: Config
    device: Device
    states: str
    sampled: int
    merged: bool
    keep: Mapping[str, Any]

    def choice(self, execution: Execution) -> Choice:
        """An execution's settings, memory and time."""
        batch, staged = self.config.optimizer.batch_size, execution.executor == "staged"
        latents = 4 * _LATENTS_KEPT * self.profile.latent * batch if staged else 0
        plain, checkpointed = self.profile.stages[execution.executor]
        peaks, seconds = self._sampling(execution)
        for name in [name for name in plain if name not in peaks]:
            run = checkpointed if _groups(name) <= set(execution.gradient_checkpointing) else plain
            stage, chunk = run[name], _chunk(name, execution, self.profile.rows)
            peaks[name] = self._peak(name, stage, chunk, execution) + (latents if name != "optimizer" else 0)
            seconds[name] = self._seconds(name, stage, batch, chunk, execution)
        return Choice(self._settings(execution), peaks, seconds)

    def _sampling(self, execution: Execution) -> tuple[dict[str, int], dict[str, float]]:
        replay, (with_merged, with_adapter) = self.config.replay, self.profile.stages["staged"]
        stages = with_merged if self.merged else with_adapter
        at_once = {"sampling": self.sampled, "sampled images": execution.decode_images}
        peaks = {name: self._peak(name, stages[name], chunk, execution) for name, chunk in at_once.items()}
        if self.merged:
            # The copies of the weights do not grow with the batch.
            merged, adapter = (run["sampling"].at_peak["activations"] for run in (with_merged, with_adapter))
            peaks["sampling"] -= max(merged - adapter, 0) * (self.sampled - 1)
        number = replay.refill / replay.steps_per_refill
        return peaks, {"sampling": self._seconds("sampling", stages["sampling"], number, self.sampled, execution)}

    def _peak(self, name: str, stage: StageCount, chunk: float, execution: Execution) -> int:
        profile, at_peak = self.profile, stage.at_peak
        weights = profile.staged_weights.get(name, 0) if execution.offload == "staged" else profile.weights
        gradients = at_peak.get("gradients", 0)
        if name in ("policy vjp", "forward", "backward", "optimizer"):
            gradients = max(gradients, profile.trained_bytes)
        kept = weights + gradients
        if self.states == "device":
            kept += profile.state_bytes
        elif name == "optimizer":
            # The update runs where the states are.
            return kept
        return kept + ceil(at_peak.get("activations", 0) * chunk)

    def _seconds(self, name: str, stage: StageCount, samples: float, chunk: float, execution: Execution) -> float:
        device, profile = self.device, self.profile
        if name == "optimizer" and self.states == "device":
            return device.seconds(stage)
        if name == "optimizer":
            # Parameters and gradients come down, parameters go up.
            return device.upload_seconds(3 * profile.trained_bytes) + profile.trained / CPU_PARAMETERS_A_SECOND
        work = scaled(stage, samples)
        # Fewer, larger calls launch fewer kernels.
        seconds = device.seconds(replace(work, operators=round(work.operators / chunk)))
        uploads = profile.uploads.get(name, 0) if execution.offload == "staged" else 0
        return seconds + device.upload_seconds(uploads)

    def _settings(self, execution: Execution) -> dict[str, Any]:
        values = execution.model_dump(exclude={"attention"})
        values |= {
            "quantization": self.profile.quantization,
            "gradient_checkpointing": list(execution.gradient_checkpointing),
        }
        return {
            **{f"execution.{key}": value for key, value in values.items()},
            "optimizer.states": self.states,
            "sampling.batch_size": self.sampled,
            "sampling.merge_lora": self.merged,
            **switches.fixed(self.config, self.keep),
        }


def simulate_full_batch(simulation: Simulation, choice: Choice, config: Config) -> Steps:
    """Simulate a choice at the batch size of ``config``: small batches, extrapolated linearly.

    Small is two chunks: what the first chunk leaves for the second is there once, not once for each sample.
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
    # What a further chunk leaves in memory does not depend on what the networks hold while they run.
    before, after = (simulation.run(execution, size, optimizer=optimizer, hollow=True) for size in (small, large))
    stages = dict(first.stages)
    for name, stage in before.stages.items():
        more = after.stages[name].peak_bytes - stage.peak_bytes
        more += max(more, 0) * (batch - large) // (large - small)
        stages[name] = _extrapolated(first.stages[name], more, 1 if name == "optimizer" else batch / small)
    return replace(first, stages=stages, samples=batch)


def _extrapolated(stage: StageCount, more: int, work: float) -> StageCount:
    at_peak = {**stage.at_peak, "activations": stage.at_peak.get("activations", 0) + more}
    return replace(scaled(stage, work), peak_bytes=stage.peak_bytes + more, at_peak=at_peak)


def _chunk(name: str, execution: Execution, rows: int) -> float:
    """Samples whose activations a stage holds at once."""
    if name in ("forward", "backward"):
        return execution.micro_batch
    if name in _NETWORK_STAGES:
        return (execution.backward_batch_rows if name.endswith("vjp") else execution.forward_batch_rows) / rows
    return execution.decode_images if name == "reward" else 1


def _groups(name: str) -> set[str]:
    """Groups whose gradient checkpointing a stage's peak depends on."""
    if name in ("forward", "backward"):
        return set(ALL_GROUPS)
    return {"decoder", "reward"} if name == "reward" else {"network"}
