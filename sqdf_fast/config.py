"""One run, described: every hyperparameter, its bounds and the paper's presets.

A run's configuration is a nested, frozen model that is validated once, at the door; the rest of the code trusts it.
Layers, later ones win: defaults of the fields < preset < file < ``--set key=value`` < flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sqdf_fast.errors import UserError

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


S = TypeVar("S", bound=Section)


class Sampling(Section):
    """How trajectories are drawn, for the replay buffer and for evaluation; docs/sampling.md."""

    num_inference_steps: Positive = Field(50, description="denoising steps T of a trajectory")
    eta: float = Field(1.0, gt=0, description="stochasticity of the sampler; 0 leaves no policy gradient")
    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance g; 1 = conditional branch only")
    batch_size: Positive = Field(4, description="samples denoised at once; changes speed and memory, not the noise")
    merge_lora: bool = Field(True, description="sample with the LoRA merged into a copy of its layers' weights")
    channels_last: bool = Field(False, description="NHWC convolution weights, of sampling and training")
    compile: Literal["none", "regional", "cuda-graphs"] = Field(
        "none", description="torch.compile of the network's repeated blocks while sampling; graphs need CUDA"
    )


class Objective(Section):
    """loss = mean(-gamma^k r(x0_hat(x_{t-1})) + alpha KL); see docs/algorithm.md."""

    alpha: float = Field(2.0, ge=0, description="KL coefficient")
    gamma: float = Field(0.9, gt=0, le=1, description="discount per remaining denoising step")
    kl_scale: float = Field(1.0, gt=0, description="1 = the published programs; 0.5 = exact Gaussian KL per element")
    credit: Literal["discount", "posterior"] = Field(
        "discount", description="gamma^k, or the variance-aware weight 1 / (1 + (1 - A_prev) / beta)"
    )
    lookahead: Literal["consistency", "tweedie", "deterministic"] = Field(
        "consistency",
        description="x0_hat: consistency model, Tweedie's formula, or n DDIM steps of the reference",
    )
    lookahead_steps: Positive = Field(2, description="n of the deterministic look-ahead")
    consistency_grid: Positive | None = Field(
        None,
        description="snap the consistency model to LCM's own grid of this many points (published code: 50)",
    )
    mask_nonpositive: bool = Field(False, description="samples with r <= 0 give neither reward nor KL (published: on)")


class Policy(Section):
    """What is trained."""

    base: Literal["network", "consistency"] = Field(
        "network", description="what the LoRA is trained on: the model, or its consistency model in a few steps"
    )
    kind: Literal["lora", "full"] = Field("lora", description="a LoRA, or every parameter of the network")
    rank: Positive = Field(4, description="LoRA rank")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="LoRA alpha; default: the rank")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="layers that get a LoRA, by suffix; default: the family's attention projections"
    )


class Optimizer(Section):
    """AdamW on the trained parameters; docs/optimizers.md."""

    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="precision of the optimizer's states; paged: evicted to the CPU under pressure (CUDA)"
    )
    states: Literal["device", "cpu"] = Field("device", description="where the states live and the update runs")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this L2 norm")
    batch_size: Positive = Field(64, description="samples an optimizer step averages over")


class Execution(Section):
    """How a step is computed: speed and memory, never the result beyond rounding; docs/engine.md."""

    executor: Literal["staged", "joint"] = Field(
        "staged", description="a vector-Jacobian product at a time, or one graph of policy, look-ahead and reward"
    )
    micro_batch: Positive = Field(1, description="joint: samples whose graph is in memory at once")
    forward_batch_rows: Positive = Field(
        8, description="staged: network rows a call without a graph; guidance has 2 a sample"
    )
    backward_batch_rows: Positive = Field(1, description="staged: network rows whose graph is in memory at once")
    decode_images: Positive = Field(1, description="staged: images decoded and scored at once, their graph in memory")
    gradient_checkpointing: tuple[Literal["network", "decoder", "reward"], ...] = Field(
        (), description="parts whose blocks are recomputed in the backward pass instead of kept"
    )
    offload: Literal["none", "staged"] = Field(
        "none", description="staged: a part's frozen weights are on the device only in the stages that use it"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="of the frozen network under a LoRA (bitsandbytes); changes the base model a little"
    )
    attention: Literal["auto", "native", "xformers"] = Field("auto", description="diffusers' attention backend")


class Baseline(Section):
    """What the algorithms beside SQDF need; docs/baselines.md."""

    truncation: Positive = Field(1, description="draft, draft-kl: K, the last denoising steps that carry a gradient")
    noises: Positive = Field(2, description="draft-lv: times the picture is noised anew")
    window: float = Field(0.25, gt=0, le=1, description="refl: share of the last steps of which one gets the gradient")
    margin: float | None = Field(
        None, description="refl: the loss is relu(margin - r), published with 2 for ImageReward; default: -r"
    )
    group: Positive = Field(
        1, description="ddpo, dpok, awm: samples a prompt whose rewards are compared; 1: all of a collection"
    )
    timesteps: Positive | None = Field(
        None, description="ddpo, dpok, awm: steps of each trajectory in an update; default: all that can be trained"
    )
    clip_range: float = Field(1e-4, gt=0, description="ddpo, dpok: the probability ratio stays within 1 +- this")
    clip_advantage: float = Field(5.0, gt=0, description="ddpo, dpok, awm: advantages stay within +- this")
    matching: Literal["uniform", "ghuber"] = Field(
        "uniform", description="awm: the mean square itself, or its fourth root times the time (published program)"
    )
    clip_matching: float = Field(1.0, gt=0, description="awm: exp(fall of the matching loss) stays within 1 +- this")


class Replay(Section):
    """The off-policy buffer D."""

    capacity: Positive = Field(1024, description="trajectories kept; the oldest leave first")
    mode: Literal["uniform", "prioritised", "on-policy"] = Field("uniform", description="how states are drawn")
    refill: Positive = Field(64, description="trajectories sampled at each refill")
    steps_per_refill: Positive = Field(1, description="replay ratio: optimizer steps between two refills")
    store: Literal["states", "x0"] = Field(
        "states", description="the trajectories' own x_t, or x_0 alone, noised forward to x_t when drawn"
    )


class Evaluation(Section):
    """Held-out prompts, the same seeds before, during and after."""

    every: int = Field(50, ge=0, description="optimizer steps between evaluations; 0 = only before and after")
    points: int = Field(
        0, ge=0, description="with a limit: evaluations spread evenly over it, in place of every; 0 = by steps"
    )
    prompts: str | None = Field(None, description="named set or file of held-out prompts; default: the preset's")
    num_prompts: Positive = Field(16, description="held-out prompts used, a fixed choice of the set")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="diversity needs at least two")
    held_out: tuple[str, ...] = Field((), description="rewards that are never trained on, scored at each evaluation")
    judges: tuple[str, ...] = Field(
        (), description="beside the model's own: clip, lpips, dreamsim, frechet or module:Class; docs/evaluation.md"
    )
    judge_options: dict[str, dict[str, str | int | float | bool]] = Field(
        default_factory=dict, description="keywords by judge or held-out reward, e.g. judge_options.clip.model=..."
    )
    grid: Positive = Field(16, description="images kept on disk at each evaluation")
    checkpoint: bool = Field(False, description="a checkpoint after each evaluation, beside checkpoint_every")


class Limits(Section):
    """What training may cost; a run ends with the step that reaches a limit. Evaluations are not counted."""

    unet_evaluations: Positive | None = Field(None, description="rows that go through the network, sampling included")
    seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="of sampling and optimizer steps")


class Monitor(Section):
    """Watches the judges while the trained reward rises; docs/monitor.md."""

    action: Literal["off", "warn", "stop", "restore"] = Field(
        "warn", description="on over-optimisation: say so, end the run, or end it with the best checkpoint"
    )

    @field_validator("action", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        # YAML 1.1 reads a bare off as false.
        return "off" if given is False else given


class Config(Section):
    """Everything that decides a run. ``config.yaml`` in the run folder is this, whole."""

    preset: str | None = Field(None, description="the named preset these values started from")
    model: str = Field("shapes", description="shapes, sd15, sdxl, sd35-medium, flux1-dev, a diffusers folder, a hub id")
    vram: str | None = Field(
        None, description="memory budget, e.g. 24G or 80%; `sqdf-fast plan` fills in the execution"
    )
    resolution: Positive | None = Field(None, description="side of the pictures in pixels; default: the model's own")
    reward: str = Field("taste", description="a registered reward, module:function, or a sum: aesthetic*1.0 + clip*0.5")
    reward_options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="keywords of the reward's loader"
    )
    algorithm: Literal["sqdf", "draft", "draft-kl", "draft-lv", "refl", "ddpo", "dpok", "awm"] = Field(
        "sqdf", description="how the policy learns from the reward; docs/baselines.md"
    )
    prompts: str = Field("shapes", description="named set ('shapes', 'animals') or a text file, one prompt a line")
    consistency_lora: str | None = Field(
        None, description="folder, file or hub id of the consistency LoRA; default: the family's own"
    )
    steps: Positive = Field(100, description="optimizer steps")
    seed: int = Field(0, ge=0, lt=2**31, description="every random number of the run derives from it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen network; the LoRA is float32 (float64 with float64)"
    )
    impl: Literal["auto", "triton", "native", "reference"] = Field("auto", description="implementation of the kernels")
    checkpoint_every: int = Field(50, ge=0, description="optimizer steps between checkpoints; 0 = only at the end")
    sampling: Sampling = Field(default_factory=Sampling)
    objective: Objective = Field(default_factory=Objective)
    policy: Policy = Field(default_factory=Policy)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    execution: Execution = Field(default_factory=Execution)
    replay: Replay = Field(default_factory=Replay)
    baseline: Baseline = Field(default_factory=Baseline)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    monitor: Monitor = Field(default_factory=Monitor)
    limits: Limits = Field(default_factory=Limits)

    @field_validator("reward_options", mode="before")
    @classmethod
    def _options_are_dotted(cls, given: Any) -> Any:
        # `--set reward_options.clip.model=F` is an option of one part of a weighted sum.
        return _dotted(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _reward_options_are_the_rewards_own(self) -> Config:
        if taken := {"spec", "device", "dtype"} & self.reward_options.keys():
            raise ValueError(f"reward_options.{min(taken)} is the run's to decide; set device or dtype of the run")
        return self

    @model_validator(mode="after")
    def _weights_can_be_where_they_are_asked_for(self) -> Config:
        execution = self.execution
        if self.policy.kind == "full" and execution.quantization != "none":
            raise ValueError(
                f"execution.quantization = {execution.quantization} freezes the network that policy.kind = full "
                "trains; set execution.quantization=none or policy.kind=lora"
            )
        if execution.quantization == "int8" and execution.offload == "staged":
            raise ValueError(
                "execution.offload = staged cannot move int8 weights, which bitsandbytes holds twice; "
                "set execution.offload=none or execution.quantization=nf4"
            )
        moved = self.sampling.merge_lora or execution.offload == "staged"
        if self.sampling.compile == "cuda-graphs" and moved:
            raise ValueError(
                "sampling.compile = cuda-graphs needs weights that stay in their place; "
                "set sampling.merge_lora=false and execution.offload=none, or sampling.compile=regional"
            )
        return self

    @model_validator(mode="after")
    def _a_consistency_policy_is_whole(self) -> Config:
        if self.policy.base == "network":
            return self
        if self.vram is not None:
            raise ValueError("--vram plans for policy.base = network; leave it out and set the execution yourself")
        wanted = {
            "policy.kind": (self.policy.kind, "lora"),
            "sampling.guidance_scale": (self.sampling.guidance_scale, 1.0),
            "objective.lookahead": (self.objective.lookahead, "consistency"),
        }
        for name, (found, needed) in wanted.items():
            if found != needed:
                raise ValueError(
                    f"{name} = {found} does not go with policy.base = consistency, a LoRA on a model that has its "
                    f"guidance distilled and looks ahead itself; set {name}={needed}"
                )
        return self

    @model_validator(mode="after")
    def _the_plan_is_of_the_algorithm(self) -> Config:
        if self.vram is not None and self.algorithm != "sqdf":
            raise ValueError(
                f"--vram plans the steps of SQDF, and algorithm is {self.algorithm}; leave --vram out and set "
                "execution.micro_batch and execution.gradient_checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _points_need_a_limit(self) -> Config:
        if self.evaluation.points and self.limits == Limits():
            raise ValueError(
                f"evaluation.points = {self.evaluation.points} spreads evaluations over a limit and there is none; set "
                "limits.unet_evaluations or limits.seconds, or use evaluation.every"
            )
        return self

    @model_validator(mode="after")
    def _buffer_holds_a_refill(self) -> Config:
        if self.replay.refill > self.replay.capacity:
            raise ValueError(
                f"replay.refill = {self.replay.refill} does not fit replay.capacity = {self.replay.capacity}: "
                "sample fewer trajectories a refill or enlarge the buffer"
            )
        return self


# Hyperparameters of the paper's tables and scripts (objective terms keep the names of docs/algorithm.md).
_PAPER: dict[str, Any] = {
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "reward": "aesthetic",
    "prompts": "animals",
    "steps": 500,
    "sampling": {"num_inference_steps": 50, "eta": 1.0, "guidance_scale": 5.0},
    "objective": {"alpha": 2.0, "gamma": 0.9, "lookahead": "consistency", "mask_nonpositive": True},
    "policy": {"rank": 4},
    "optimizer": {"lr": 1e-3, "weight_decay": 1e-4, "max_grad_norm": 1.0, "batch_size": 64},
    "replay": {"capacity": 1024, "mode": "uniform", "refill": 64, "steps_per_refill": 1},
}


def _dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= _dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {
        "model": "shapes",
        "reward": "taste",
        "prompts": "shapes",
        "steps": 80,
        "checkpoint_every": 40,
        "sampling": {"num_inference_steps": 20, "guidance_scale": 4.0, "batch_size": 16},
        "objective": {"alpha": 16.0, "gamma": 0.9},
        "policy": {"rank": 8},
        "optimizer": {"lr": 1e-3, "batch_size": 16},
        "execution": {
            "executor": "joint",
            "micro_batch": 16,
            "forward_batch_rows": 32,
            "backward_batch_rows": 32,
            "decode_images": 16,
        },
        "replay": {"capacity": 64, "refill": 16, "steps_per_refill": 8},
        "evaluation": {
            "prompts": "shapes-held-out",
            "every": 20,
            "num_prompts": 32,
            "held_out": ("taste-held-out",),
        },
    },
    "aesthetic": _PAPER,
    "sdxl": _merge(
        _PAPER,
        {"model": "stabilityai/stable-diffusion-xl-base-1.0", "objective": {"mask_nonpositive": False}},
    ),
    "sd35": _merge(
        _PAPER,
        {
            "model": "stabilityai/stable-diffusion-3.5-medium",
            "sampling": {"num_inference_steps": 40, "eta": 0.7, "guidance_scale": 4.5},
            "objective": {"lookahead": "tweedie", "mask_nonpositive": False},
        },
    ),
    "flux": _merge(
        _PAPER,
        {
            "model": "black-forest-labs/FLUX.1-dev",
            "sampling": {"num_inference_steps": 28, "eta": 0.9, "guidance_scale": 1.0},
            "objective": {"lookahead": "tweedie", "mask_nonpositive": False},
        },
    ),
    "hpsv2": _merge(
        _PAPER,
        {
            "reward": "hpsv2",
            "objective": {"alpha": 0.05, "gamma": 0.93},
            "policy": {"rank": 32},
            "optimizer": {"lr": 5e-4, "batch_size": 256},
            "replay": {"capacity": 4096, "refill": 256},
        },
    ),
    "black-box": _merge(
        _PAPER,
        {
            "sampling": {"guidance_scale": 7.5},
            "objective": {"alpha": 1.0},
            "optimizer": {"weight_decay": 0.1, "max_grad_norm": 5.0},
            "replay": {"mode": "prioritised"},
        },
    ),
}
PRESETS["hpsv2-script"] = _merge(
    PRESETS["hpsv2"], {"objective": {"alpha": 0.005, "gamma": 0.9}, "optimizer": {"lr": 2e-4}}
)


_CONSISTENCY_SAMPLING = {"sampling": {"num_inference_steps": 4, "guidance_scale": 1.0}}


def default_preset(model: str) -> str:
    """The preset for a model that none was named for; a model that no preset is of takes the paper's, "aesthetic"."""
    short = {"shapes": "shapes", "sdxl": "sdxl", "sd35-medium": "sd35", "flux1-dev": "flux"}
    return short.get(model) or next((name for name in short.values() if PRESETS[name]["model"] == model), "aesthetic")


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key that ``--set`` accepts."""
    names = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += setting_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["objective.alpha=2", ...]`` as a nested dictionary; values are YAML scalars or lists.

    Raises UserError for a missing '=' and for a value that is not YAML.
    """
    nested: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment}: expected key=value, e.g. --set objective.alpha=2")
        try:
            value = _number(yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(
                f"--set {assignment}: the value is not valid YAML; quote it if it holds ':' or '['"
            ) from None
        nested = _merge(nested, _nest(key.split("."), value))
    return nested


def _nest(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nest(path[1:], value)}


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 (no dot) as a string.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_config_file(path: Path) -> dict[str, Any]:
    """A YAML file as a nested dictionary. Raises UserError when it is missing or is not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(
            f"configuration file {path}: not valid YAML{line}; see a run's config.yaml for an example"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"configuration file {path}: expected a mapping of settings; see a run's config.yaml")
    return data


def make_config(
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    assignments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge the layers and validate. The flag policy.base = consistency brings its few steps without guidance along.

    Raises UserError: one line that names the key, the value and what is allowed.
    """
    few_steps = _CONSISTENCY_SAMPLING if ((flags or {}).get("policy") or {}).get("base") == "consistency" else None
    layers = [dict(layer) for layer in (few_steps, file, assignments, flags) if layer]
    for layer in layers:
        preset = layer.get("preset") or preset
    merged: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"preset {preset!r} is unknown; allowed: {', '.join(sorted(PRESETS))}")
        merged = _merge(PRESETS[preset], {"preset": preset})
    for layer in layers:
        merged = _merge(merged, layer)
    return validate(Config, merged)


def given_settings(
    file: Mapping[str, Any] | None = None,
    assignments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Dotted keys that the layers of `make_config` set themselves: what a plan keeps.

    A file with every setting, a run's config.yaml, counts as none: what of it was planned and what was asked for can no
    longer be told apart.
    """
    whole = file is not None and set(file) >= set(Config.model_fields)
    layers = (None if whole else file, assignments, flags)
    return tuple(dict.fromkeys(key for layer in layers if layer for key in _dotted(layer)))


def validate(section: type[S], values: Mapping[str, Any]) -> S:
    """``values`` as a section. Raises UserError: one line that names the key, the value and what is allowed."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, section)) from None


def _one_line(error: ValidationError, section: type[Section]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("constrained-int", "constrained-float"))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, setting_names(section), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(setting_names(section))}"
        return f"setting {key!r} is unknown; {hint}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].removeprefix("Input should be ").rstrip(".")
    return f"setting {key} = {first['input']!r} is not allowed: it must be {message}"


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with these dotted keys changed, validated anew. Raises UserError as `validate`."""
    values = config.model_dump(mode="json")
    for key, value in settings.items():
        values = _merge(values, _nest(key.split("."), value))
    return validate(Config, values)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, readable back with :func:`read_config_file`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_settings(section: type[BaseModel] = Config, prefix: str = "") -> str:
    """Every setting with its default and meaning, one a line: what ``--help-settings`` prints."""
    lines = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            heading = (field.annotation.__doc__ or "").strip().splitlines()[0]
            lines += ["", heading, describe_settings(field.annotation, f"{prefix}{name}.")]
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = ",".join(default) if isinstance(default, tuple) else default
            lines.append(f"  {prefix + name:<34}{shown!s:<24}{field.description or ''}".rstrip())
    return "\n".join(lines)
