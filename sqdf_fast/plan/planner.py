"""From a configuration and a number of bytes to a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from sqdf_fast.config import Config, Execution, current_names, default_preset, make_config
from sqdf_fast.display import format_duration, text_table
from sqdf_fast.errors import UserError
from sqdf_fast.families.loading import family_from_configs
from sqdf_fast.plan import cache
from sqdf_fast.plan.device import CPU, GIB, Device, find_device, reserve_bytes
from sqdf_fast.plan.fake import only_new_garbage
from sqdf_fast.plan.memory import StageCount, scaled
from sqdf_fast.plan.search import Choice, Profile, choices, fastest, profile, whole
from sqdf_fast.plan.simulate import Simulation, Steps
from sqdf_fast.plan.switches import Switch, explained
from sqdf_fast.plan.workspace import on_cpu
from sqdf_fast.rewards.registry import reward_from_config

T = TypeVar("T", Profile, Steps)

ALLOWED = ("nf4", "int8")
"""What changes the result, and is tried only when asked for."""

PLANNED = frozenset(
    {
        *(f"execution.{name}" for name in Execution.model_fields),
        *(f"sampling.{name}" for name in ("batch_size", "merge_lora", "channels_last", "compile")),
        "optimizer.states",
    }
)
"""Settings that a plan chooses."""


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        live_gib: the most that is alive during the stage; weights_gib: of that, weights.
        flops, seconds: of a whole optimizer step; sampling: its share of the trajectories.
        note: what was traded.
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
        fits: whether anything does; else the plan is the smallest one and `advice` says what is missing.
        vram_gib: the budget; peak_gib: most that the allocator holds; reserve_gib: kept free beside it.
        executor, micro_batch: the settings' own, micro_batch the samples whose graph is in memory at once.
        settings: dotted configuration keys to values, for `make_config`.
        flops_per_step, predicted_seconds: of one optimizer step with its share of the sampling; the time is a model
            of `device`, no measurement.
        replay_ratio: optimizer steps a refill that the time is of; it changes the result, so no plan sets it.
        switches: of speed, each with its reason.
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
        """Everything, readable back with `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """What `as_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        values = json.loads(text)
        values["settings"] = current_names(dict(values["settings"]))
        values["stages"] = tuple(PlannedStage(**stage) for stage in values["stages"])
        values["switches"] = tuple(Switch(**switch) for switch in values.get("switches", ()))
        return Plan(**values)

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
    """The fastest plan for ``config`` that fits ``vram_bytes``; if none fits, the smallest one and what would help.

    Needs neither a GPU nor weights. The settings in PLANNED are the plan's to choose, but for those in ``keep``; of the
    configuration's own it keeps optimizer.states=cpu, sampling.merge_lora=false and a quantization.

    Args:
        vram_bytes: what the process may take of the card, its context included.
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
    kept = {key: value for key, value in _values(config).items() if key in keep and key in PLANNED}
    inputs = config.model_dump(mode="json"), vram_bytes, device.name, sorted(allow), sorted(kept)
    key = cache.key_of(kind="plan", inputs=inputs)
    if use_cache and (stored := cache.read(key)) is not None:
        try:
            return Plan.from_json(json.dumps(stored["plan"]))
        except (KeyError, TypeError, ValueError):
            pass
    with only_new_garbage():
        plan = Planner(config, allow, use_cache, on_cpu=device is CPU, keep=kept).plan(vram_bytes, device)
    if use_cache:
        cache.write(key, {"plan": json.loads(plan.as_json())})
    return plan


class Planner:
    """Plans of one configuration; what has been simulated serves every budget.

    Args:
        config, allow: see `make_plan`; keep: settings that stay, by dotted key.
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
        # Full-parameter training has nothing frozen to quantise but the reference, which can stay on the host.
        self.quantizations = ["none"] if config.policy.kind == "full" else wanted
        self._simulations: dict[str, Simulation] = {}
        self._profiles: dict[str, Profile] = {}
        self._steps: dict[str, Steps] = {}

    def plan(self, vram_bytes: int, device: Device) -> Plan:
        """The fastest plan that fits, simulated whole."""
        budget = vram_bytes - reserve_bytes(vram_bytes, device)
        found = self.choices(device)
        while (choice := fastest(found, budget)) is not None:
            steps = self._whole(choice)
            if steps.peak_bytes <= budget:
                return self._plan(choice, steps, vram_bytes, device)
            found.remove(choice)
        every = self.choices(device)
        smallest = min(every, key=lambda choice: (choice.peak_bytes, choice.total_seconds))
        steps = self._whole(smallest)
        advice = self._advice(steps, budget)
        return self._plan(smallest, steps, vram_bytes, device, advice)

    def smallest(self, device: Device) -> Plan:
        """The plan of the least peak, whatever it costs."""
        every = self.choices(device)
        choice = min(every, key=lambda choice: (choice.peak_bytes, choice.total_seconds))
        steps = self._whole(choice)
        # A budget in which it just fits.
        vram = steps.peak_bytes + reserve_bytes(steps.peak_bytes, device)
        return self._plan(choice, steps, vram, device)

    def batch_cost(self, choice: Choice) -> int:
        """Bytes that the optimizer step of the whole batch holds above that of a single sample."""
        one = self.config.optimizer.model_copy(update={"batch_size": 1})
        alone = whole(
            self.simulation(choice.settings["execution.quantization"]),
            choice,
            self.config.model_copy(update={"optimizer": one}),
        )
        many = self._whole(choice)
        return _step_peak(many) - _step_peak(alone)

    def choices(self, device: Device) -> list[Choice]:
        """Every choice of every quantization."""
        found = [c for q in self.quantizations for c in choices(self.profile(q), self.config, device, self.keep)]
        if not found:
            raise UserError(f"no plan has all of {self._kept_settings()}; leave one out")
        return found

    def profile(self, quantization: str) -> Profile:
        """One sample's simulation, made once."""
        if quantization not in self._profiles:
            self._profiles[quantization] = self._kept(
                {"profile": quantization}, Profile, lambda: profile(self.simulation(quantization), quantization)
            )
        return self._profiles[quantization]

    def simulation(self, quantization: str = "none") -> Simulation:
        """The setup on the meta device."""
        if quantization not in self._simulations:
            config = self.config
            dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
            family = family_from_configs(
                config.model, device=torch.device("meta"), dtype=dtype, resolution=config.resolution
            )
            reward = reward_from_config(config.reward, device="meta", dtype=dtype)
            consistency = None
            if config.objective.lookahead == "consistency":
                consistency = config.consistency_lora or family.default_consistency_lora()
                if consistency is None:
                    raise UserError(
                        f"model {config.model!r} has no consistency LoRA of its own; "
                        "give consistency_lora (`sqdf-fast distill` makes one) or set objective.lookahead=tweedie"
                    )
            where: dict[str, Any] = {"workspace": on_cpu, "granularity": 1} if self.on_cpu else {}
            simulation = Simulation(config, family, reward, quantization=quantization, consistency=consistency, **where)
            self._simulations[quantization] = simulation
        return self._simulations[quantization]

    def _whole(self, choice: Choice) -> Steps:
        key = json.dumps(choice.settings, sort_keys=True)
        if key not in self._steps:
            quantization = choice.settings["execution.quantization"]
            self._steps[key] = self._kept(
                {"steps": choice.settings}, Steps, lambda: whole(self.simulation(quantization), choice, self.config)
            )
        return self._steps[key]

    def _kept(self, what: dict[str, Any], kind: type[T], make: Callable[[], T]) -> T:
        """What the disk has of it, or else made and put there."""
        key = cache.key_of(**what, config=self.config.model_dump(mode="json"), on_cpu=self.on_cpu)
        stored = cache.read(key) if self.use_cache else None
        if stored is not None:
            try:
                return kind.from_values(stored["values"])
            except (KeyError, TypeError, ValueError, AttributeError):
                pass
        made = make()
        if self.use_cache:
            cache.write(key, {"values": made.as_values()})
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


def _values(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        values |= _values(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return values


def _line(name: str, work: StageCount, choice: Choice, steps: Steps, device: Device, batch: int) -> PlannedStage:
    uploads = steps.uploads.get(name, 0)
    seconds = choice.seconds.get(name, 0.0) if name == "optimizer" else device.seconds(work)
    if name == "sampled pictures":
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
    if name in ("sampling", "sampled pictures"):
        notes.append(f"{settings['sampling.batch_size']} at once")
        if name == "sampling" and not settings["sampling.merge_lora"]:
            notes.append("LoRA not merged")
    elif name == "reward":
        notes.append(f"{execution.decode_images} pictures at once")
    elif name in ("transition", "look-ahead", "look-ahead vjp", "policy vjp"):
        rows = execution.backward_batch_rows if name.endswith("vjp") else execution.forward_batch_rows
        notes.append(f"{rows} rows at once")
    elif name in ("forward", "backward"):
        notes.append(f"{execution.micro_batch} samples at once")
    part = "network" if name.endswith("vjp") else "decoder" if name == "reward" else None
    if part in execution.gradient_checkpointing or (name == "backward" and execution.gradient_checkpointing):
        notes.append("blocks recomputed")
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
