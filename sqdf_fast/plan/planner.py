"""Plans: how to run a configuration inside a memory budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from sqdf_fast.config import Config, Execution, current_names, default_preset, dotted, make_config
from sqdf_fast.display import format_duration, text_table
from sqdf_fast.engine.loading import consistency_source
from sqdf_fast.errors import UserError
from sqdf_fast.families.loading import family_from_configs
from sqdf_fast.plan import cache
from sqdf_fast.plan.device import CPU, GIB, Device, find_device, reserve_bytes
from sqdf_fast.plan.fake import DEVICE, only_new_garbage
from sqdf_fast.plan.memory import StageCount, scaled
from sqdf_fast.plan.search import Choice, Profile, choices, fastest, profile, simulate_full_batch
from sqdf_fast.plan.simulate import Simulation, Steps
from sqdf_fast.plan.switches import Switch, explained
from sqdf_fast.plan.workspace import on_cpu
from sqdf_fast.rewards.registry import reward_from_config

T = TypeVar("T")

ALLOWED = ("nf4", "int8")
"""Quantizations change the result, so they are tried only when allowed."""

PLANNED = frozenset(
    {
        *(f"execution.{name}" for name in Execution.model_fields),
        *(f"sampling.{name}" for name in ("batch_size", "merge_lora", "channels_last", "compile")),
        "optimizer.states",
    }
)
"""Settings that a plan chooses."""

_RENAMED_STAGES = {"sampled pictures": "sampled images"}


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        live_gib: peak memory of the stage; weights_gib: frozen and trained weights in it.
        flops, seconds: work and predicted time in an optimizer step; of sampling, the step's share.
        note: chunk sizes, and what was traded for memory.
    """

    name: str
    live_gib: float
    weights_gib: float
    flops: float
    seconds: float
    note: str


@dataclass(frozen=True)
class Plan:
    """How to run a configuration inside a budget.

    Attributes:
        fits: whether the plan fits the budget; if not, it is the smallest plan, and `advice` says what would help.
        vram_gib: the budget; peak_gib: peak of allocated memory; reserve_gib: kept free beside it.
        executor, micro_batch: executor, and the samples whose graph is in memory at once.
        settings: dotted configuration keys to values, for `make_config`.
        flops_per_step, predicted_seconds: one optimizer step with its share of the sampling; the time is modelled for
            `device`, not measured.
        replay_ratio: optimizer steps per refill in that time; it changes the result, so no plan sets it.
        switches: speed settings, each with its reason.
    """

    fits: bool
    model: str
    device: str
    vram_gib: float
    peak_gib: float
    reserve_gib: float
    executor: str
    micro_batch: int
    settings: dict[str, Any]
    stages: tuple[PlannedStage, ...]
    flops_per_step: float
    predicted_seconds: float
    advice: str = ""
    replay_ratio: int = 1
    switches: tuple[Switch, ...] = field(default=())

    def as_json(self) -> str:
        """The plan as JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan of `as_json`, of earlier versions too. Raises ValueError for anything else."""
        try:
            plan = TypeAdapter(Plan).validate_json(text)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from None
        stages = tuple(dataclasses.replace(s, name=_RENAMED_STAGES.get(s.name, s.name)) for s in plan.stages)
        return dataclasses.replace(plan, settings=current_names(plan.settings), stages=stages)

    def as_text(self) -> str:
        """A table for people."""
        rows = [[s.name, f"{s.live_gib:.2f}", f"{s.flops / 1e12:.1f}", f"{s.seconds:.2f}", s.note] for s in self.stages]
        table = text_table(("stage", "live GiB", "TFLOP", "seconds", "traded"), rows, left=(0, 4))
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            table,
            "",
            f"{self.model} {verdict} {self.vram_gib:.2f} GiB: "
            f"peak {self.peak_gib:.2f} + reserve {self.reserve_gib:.2f} GiB",
            f"a step: {self.flops_per_step / 1e12:.0f} TFLOP, about {format_duration(self.predicted_seconds)} on a "
            f"{self.device} (a model of the card, not a measurement)",
            self._replay_line(),
            "settings: " + " ".join(f"{key}={_shown(value)}" for key, value in self.settings.items()),
            *(f"{s.key}={_shown(s.value)}: {s.reason}" for s in self.switches),
        ]
        return "\n".join(lines + ([self.advice] if self.advice else []))

    def _replay_line(self) -> str:
        sampling = sum(stage.seconds for stage in self.stages if stage.name == "sampling")
        rest, ratio = self.predicted_seconds - sampling, self.replay_ratio
        others = ", ".join(f"{r}: {format_duration(rest + sampling * ratio / r)}" for r in (1, 4, 8) if r != ratio)
        return f"replay.steps_per_refill is {ratio} and yours to set, it changes the result; a step at {others}"


def make_plan(
    config: Config,
    vram_bytes: int,
    *,
    device_name: str | None = None,
    allow: Sequence[str] = (),
    keep: Collection[str] = (),
    use_cache: bool = True,
) -> Plan:
    """The fastest plan for ``config`` that fits ``vram_bytes``; if none fits, the smallest one with advice.

    Needs neither a GPU nor weights. The settings in PLANNED are the plan's to choose, but for those in ``keep``; of the
    configuration's own it keeps optimizer.states=cpu, sampling.merge_lora=false and a quantization.

    Args:
        vram_bytes: memory that the process may take of the GPU, its context included.
        device_name: a GPU for the time's model, as in `sqdf_fast.plan.device.DEVICES`; None: one of that size; "CPU"
            plans for none.
        allow: "nf4", "int8": quantizations of the frozen network that may be tried.
        keep: dotted keys of settings that stay as ``config`` has them; others than those in PLANNED stay anyway.
        use_cache: read and write plans on disk.

    Raises:
        UserError: an architecture or a reward that cannot be simulated, ``allow`` of something else, or settings in
            ``keep`` that contradict each other.
    """
    if unknown := set(allow) - set(ALLOWED):
        raise UserError(f"allow = {min(unknown)!r} is unknown; allowed: {', '.join(ALLOWED)}")
    device = find_device(device_name, vram_bytes)
    kept = {key: value for key, value in dotted(config.model_dump()).items() if key in keep and key in PLANNED}
    inputs = config.model_dump(mode="json"), vram_bytes, device.name, sorted(allow), sorted(kept)
    key = cache.key_of(kind="plan", inputs=inputs)
    if use_cache and (stored := cache.read(key, Plan)) is not None:
        return stored
    with only_new_garbage():
        plan = Planner(config, allow, use_cache, on_cpu=device is CPU, keep=kept).plan(vram_bytes, device)
    if use_cache:
        cache.write(key, plan)
    return plan


class Planner:
    """Plans of one configuration; what has been simulated serves every budget.

    Args:
        config, allow: see `make_plan`; keep: fixed settings, by dotted key.
    """

    def __init__(
        self,
        config: Config,
        allow: Sequence[str] = (),
        use_cache: bool = True,
        on_cpu: bool = False,
        keep: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self.use_cache, self.on_cpu, self.keep = config, use_cache, on_cpu, keep
        asked = config.execution.quantization
        wanted = [asked] if asked != "none" or "execution.quantization" in keep else ["none", *allow]
        # A fully trained policy leaves nothing to quantise but the reference, which can be offloaded.
        self.quantizations = ["none"] if config.policy.kind == "full" else wanted
        self._simulations: dict[str, Simulation] = {}
        self._profiles: dict[str, Profile] = {}
        self._steps: dict[str, Steps] = {}

    def plan(self, vram_bytes: int, device: Device) -> Plan:
        """The fastest plan whose full batch, simulated, fits; else the smallest one with advice."""
        budget = vram_bytes - reserve_bytes(vram_bytes, device)
        found = self.choices(device)
        while (choice := fastest(found, budget)) is not None:
            steps = self._full_batch(choice)
            if steps.peak_bytes <= budget:
                return self._plan(choice, steps, vram_bytes, device)
            found.remove(choice)
        smallest, steps = self._smallest(device)
        return self._plan(smallest, steps, vram_bytes, device, self._advice(steps, budget))

    def smallest(self, device: Device) -> Plan:
        """The plan of the least peak, whatever it costs."""
        choice, steps = self._smallest(device)
        # The smallest budget that it fits.
        vram = steps.peak_bytes + reserve_bytes(steps.peak_bytes, device)
        return self._plan(choice, steps, vram, device)

    def batch_cost(self, choice: Choice) -> int:
        """Bytes that the optimizer step of the full batch holds above that of a single sample."""
        one = self.config.optimizer.model_copy(update={"batch_size": 1})
        simulation = self.simulation(choice.settings["execution.quantization"])
        alone = simulate_full_batch(simulation, choice, self.config.model_copy(update={"optimizer": one}))
        return _step_peak(self._full_batch(choice)) - _step_peak(alone)

    def choices(self, device: Device) -> list[Choice]:
        """Every choice of every quantization. Raises UserError when the fixed settings contradict each other."""
        found = [c for q in self.quantizations for c in choices(self.profile(q), self.config, device, self.keep)]
        if not found:
            raise UserError(f"no plan has all of {self._kept_settings()}; leave one out")
        return found

    def profile(self, quantization: str) -> Profile:
        """The simulation of one sample, made once."""
        if quantization not in self._profiles:
            self._profiles[quantization] = self._cached(
                {"profile": quantization}, Profile, lambda: profile(self.simulation(quantization), quantization)
            )
        return self._profiles[quantization]

    def simulation(self, quantization: str = "none") -> Simulation:
        """The setup on the meta device. Raises UserError for a model or reward that cannot be simulated."""
        if quantization not in self._simulations:
            config = self.config
            dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
            family = family_from_configs(config.model, device=DEVICE, dtype=dtype, resolution=config.resolution)
            reward = reward_from_config(config.reward, device="meta", dtype=dtype)
            where: dict[str, Any] = {"workspace": on_cpu, "granularity": 1} if self.on_cpu else {}
            self._simulations[quantization] = Simulation(
                config,
                family,
                reward,
                quantization=quantization,
                consistency=consistency_source(config, family),
                **where,
            )
        return self._simulations[quantization]

    def _smallest(self, device: Device) -> tuple[Choice, Steps]:
        choice = min(self.choices(device), key=lambda choice: (choice.peak_bytes, choice.total_seconds))
        return choice, self._full_batch(choice)

    def _full_batch(self, choice: Choice) -> Steps:
        key = json.dumps(choice.settings, sort_keys=True)
        if key not in self._steps:
            simulation = partial(self.simulation, choice.settings["execution.quantization"])
            self._steps[key] = self._cached(
                {"steps": choice.settings}, Steps, lambda: simulate_full_batch(simulation(), choice, self.config)
            )
        return self._steps[key]

    def _cached(self, what: dict[str, Any], kind: type[T], make: Callable[[], T]) -> T:
        """The stored result; else the one of ``make``, which is then stored."""
        key = cache.key_of(**what, config=self.config.model_dump(mode="json"), on_cpu=self.on_cpu)
        stored = cache.read(key, kind) if self.use_cache else None
        if stored is not None:
            return stored
        made = make()
        if self.use_cache:
            cache.write(key, made)
        return made

    def _plan(self, choice: Choice, steps: Steps, vram: int, device: Device, advice: str = "") -> Plan:
        replay, batch = self.config.replay, self.config.optimizer.batch_size
        share = replay.refill / replay.steps_per_refill / steps.sampled
        stages, settings = [], choice.settings
        for name, stage in steps.stages.items():
            work = scaled(stage, share) if name == "sampling" else stage
            stages.append(_line(name, work, choice, steps, device, batch))
        return Plan(
            fits=not advice,
            model=self.config.model,
            device=device.name,
            vram_gib=vram / GIB,
            peak_gib=steps.peak_bytes / GIB,
            reserve_gib=reserve_bytes(vram, device) / GIB,
            executor=settings["execution.executor"],
            micro_batch=_micro_batch(settings),
            settings=settings,
            stages=tuple(stages),
            flops_per_step=float(sum(stage.flops for stage in stages)),
            predicted_seconds=sum(stage.seconds for stage in stages),
            advice=advice,
            replay_ratio=replay.steps_per_refill,
            switches=explained(self.config, settings, self.keep, self.on_cpu),
        )

    def _advice(self, steps: Steps, budget: int) -> str:
        missing = (steps.peak_bytes - budget) / GIB
        worst = max(steps.stages, key=lambda name: steps.stages[name].peak_bytes)
        ideas = [f"leaving out {self._kept_settings()}"] if self.keep else []
        if self.config.policy.kind == "full":
            ideas.append("policy.kind=lora")
        elif self.quantizations == ["none"]:
            ideas.append("a quantised base (--allow nf4)")
        if self.config.dtype in ("float32", "float64"):
            ideas.append("dtype=bfloat16")
        ideas += ["a smaller model or resolution", "a card with more memory"]
        return f"short by {missing:.2f} GiB in the stage '{worst}' even so; what would help: {', '.join(ideas)}"

    def _kept_settings(self) -> str:
        return ", ".join(f"{key}={_shown(value)}" for key, value in self.keep.items())


def _line(name: str, work: StageCount, choice: Choice, steps: Steps, device: Device, batch: int) -> PlannedStage:
    uploads = steps.uploads.get(name, 0)
    seconds = choice.seconds.get(name, 0.0) if name == "optimizer" else device.seconds(work)
    if name == "sampled images":
        # Only evaluations decode them.
        work, seconds = dataclasses.replace(work, flops=0), 0.0
    elif name != "optimizer":
        seconds += device.upload_seconds(uploads)
    return PlannedStage(
        name,
        round(work.peak_bytes / GIB, 4),
        round(work.at_peak.get("weights", 0) / GIB, 4),
        float(work.flops),
        round(seconds, 4),
        _note(name, choice, uploads),
    )


def _note(name: str, choice: Choice, uploads: int) -> str:
    execution, settings, notes = choice.execution, choice.settings, []
    if name == "sampling":
        notes.append(f"{settings['sampling.batch_size']} images at once")
        if not settings["sampling.merge_lora"]:
            notes.append("LoRA not merged")
    elif name in ("sampled images", "reward"):
        notes.append(f"{execution.decode_images} images at once")
    elif name in ("transition", "look-ahead", "look-ahead vjp", "policy vjp"):
        rows = execution.backward_batch_rows if name.endswith("vjp") else execution.forward_batch_rows
        notes.append(f"{rows} rows at once")
    elif name in ("forward", "backward"):
        notes.append(f"{execution.micro_batch} samples at once")
    part = "network" if name.endswith("vjp") else "decoder" if name == "reward" else None
    if part in execution.gradient_checkpointing or (name == "backward" and execution.gradient_checkpointing):
        notes.append("gradient checkpointing")
    if uploads:
        notes.append(f"{uploads / GIB:.2f} GiB of weights uploaded")
    if name == "optimizer" and settings["optimizer.states"] == "cpu":
        notes.append("states on the CPU")
    if settings["execution.quantization"] != "none" and name in ("transition", "policy vjp", "forward"):
        notes.append(f"{settings['execution.quantization']} base")
    return ", ".join(notes)


def _step_peak(steps: Steps) -> int:
    return max(stage.peak_bytes for name, stage in steps.stages.items() if not name.startswith("sampl"))


def _micro_batch(settings: dict[str, Any]) -> int:
    joint = settings["execution.executor"] == "joint"
    return int(settings["execution.micro_batch" if joint else "execution.decode_images"])


def _shown(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list | tuple) else str(value)


def paper_config(model: str, **over: Any) -> Config:
    """The paper's settings, 64 samples a step and the aesthetic reward, on a known model."""
    return make_config(default_preset(model), flags={"model": model, **over})
