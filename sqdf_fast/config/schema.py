"""One run, described: every hyperparameter and its bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sqdf_fast.config.algorithms import (
    AwmSettings,
    DdpoSettings,
    DpokSettings,
    DraftKlSettings,
    DraftLvSettings,
    DraftSettings,
    ReflSettings,
    readers,
    section_of,
)
from sqdf_fast.config.section import Positive, Section, dotted


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

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Keywords of :func:`sqdf_fast.objective.sqdf_loss` and ``credited_loss``."""
        return self.model_dump(include={"alpha", "gamma", "credit", "mask_nonpositive"})


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
    """How a step is computed: affects speed and memory, and results by rounding only; docs/engine.md."""

    executor: Literal["staged", "joint"] = Field(
        "staged", description="one vector-Jacobian product at a time, or one graph of policy, look-ahead and reward"
    )
    micro_batch: Positive = Field(1, description="joint: samples whose graph is in memory at once")
    forward_batch_rows: Positive = Field(
        8, description="staged: network rows a call without a graph; guidance has 2 a sample"
    )
    backward_batch_rows: Positive = Field(1, description="staged: network rows whose graph is in memory at once")
    decode_images: Positive = Field(1, description="staged: images decoded and scored at once, their graph in memory")
    gradient_checkpointing: tuple[Literal["network", "decoder", "reward"], ...] = Field(
        (), description="groups of modules whose blocks use gradient checkpointing"
    )
    offload: Literal["none", "staged"] = Field(
        "none", description="staged: frozen weights are on the device only in the stages that use them"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="bits of the frozen network under a LoRA (bitsandbytes); changes the base model slightly"
    )
    attention: Literal["auto", "native", "xformers"] = Field("auto", description="diffusers' attention backend")


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
        0, ge=0, description="with a limit: evaluations spread evenly over it, instead of every; 0 = by steps"
    )
    prompts: str | None = Field(None, description="named set or file of held-out prompts; default: the preset's")
    num_prompts: Positive = Field(16, description="held-out prompts used, a fixed choice of the set")
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="diversity needs at least two")
    held_out: tuple[str, ...] = Field((), description="rewards that are never trained on, scored at each evaluation")
    judges: tuple[str, ...] = Field(
        (), description="added to the model's own: clip, lpips, dreamsim, frechet or module:Class; docs/evaluation.md"
    )
    judge_options: dict[str, dict[str, str | int | float | bool]] = Field(
        default_factory=dict, description="keywords by judge or held-out reward, e.g. judge_options.clip.model=..."
    )
    grid: Positive = Field(16, description="images kept on disk at each evaluation")
    checkpoint: bool = Field(False, description="a checkpoint after each evaluation as well")


class Limits(Section):
    """What training may cost; a run ends with the step that reaches a limit. Evaluations are not counted."""

    unet_evaluations: Positive | None = Field(None, description="rows that go through the network, sampling included")
    seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds of sampling and optimizer steps")


class Monitor(Section):
    """Watches the judges while the trained reward rises; docs/monitor.md."""

    action: Literal["off", "warn", "stop", "restore"] = Field(
        "warn", description="on over-optimization: warn, end the run, or end it with the best checkpoint"
    )

    @field_validator("action", mode="before")
    @classmethod
    def _read_off(cls, given: Any) -> Any:
        # YAML 1.1 reads a bare off as false.
        return "off" if given is False else given


class Logging(Section):
    """Where metrics go in addition to metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="experiment trackers that get metrics and images, through accelerate"
    )


class Config(Section):
    """Every setting of a run. ``config.yaml`` in its folder has those that the run reads."""

    preset: str | None = Field(None, description="the named preset these values started from")
    model: str = Field("shapes", description="shapes, sd15, sdxl, sd35-medium, flux1-dev, a diffusers folder, a hub id")
    vram: str | None = Field(
        None, description="memory budget, e.g. 24G or 80%; `sqdf-fast plan` fills in the execution"
    )
    resolution: Positive | None = Field(None, description="side of the images in pixels; default: the model's own")
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
        "auto", description="dtype of the frozen network; the LoRA is float32 (float64 with float64)"
    )
    impl: Literal["auto", "triton", "native", "reference"] = Field("auto", description="implementation of the kernels")
    checkpoint_every: int = Field(50, ge=0, description="optimizer steps between checkpoints; 0 = only at the end")
    sampling: Sampling = Field(default_factory=Sampling)
    objective: Objective = Field(default_factory=Objective)
    policy: Policy = Field(default_factory=Policy)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    execution: Execution = Field(default_factory=Execution)
    replay: Replay = Field(default_factory=Replay)
    draft: DraftSettings = Field(default_factory=DraftSettings)
    draft_kl: DraftKlSettings = Field(default_factory=DraftKlSettings)
    draft_lv: DraftLvSettings = Field(default_factory=DraftLvSettings)
    refl: ReflSettings = Field(default_factory=ReflSettings)
    ddpo: DdpoSettings = Field(default_factory=DdpoSettings)
    dpok: DpokSettings = Field(default_factory=DpokSettings)
    awm: AwmSettings = Field(default_factory=AwmSettings)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    monitor: Monitor = Field(default_factory=Monitor)
    limits: Limits = Field(default_factory=Limits)
    logging: Logging = Field(default_factory=Logging)

    @property
    def own(self) -> Any:
        """The algorithm's own settings, such as those of section ``ddpo``; see :class:`AlgorithmSettings`."""
        return getattr(self, section_of(self.algorithm))

    def reads(self, key: str) -> bool:
        """Whether the algorithm reads this setting, by its dotted key."""
        return self.algorithm in readers(key)

    @field_validator("reward_options", mode="before")
    @classmethod
    def _as_dotted_keys(cls, given: Any) -> Any:
        # `--set reward_options.clip.model=F` is an option of one part of a weighted sum.
        return dotted(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _check(self) -> Config:
        if message := next(chain(self._impossible_weights(), self._impossible_run()), None):
            raise ValueError(message)
        return self

    def _impossible_weights(self) -> Iterator[str]:
        execution, policy = self.execution, self.policy
        if policy.kind == "full" and execution.quantization != "none":
            yield (
                f"execution.quantization = {execution.quantization} freezes the network that policy.kind = full "
                "trains; set execution.quantization=none or policy.kind=lora"
            )
        if execution.quantization == "int8" and execution.offload == "staged":
            yield (
                "execution.offload = staged cannot move int8 weights, which bitsandbytes keeps twice; "
                "set execution.offload=none or execution.quantization=nf4"
            )
        if self.sampling.compile == "cuda-graphs" and (self.sampling.merge_lora or execution.offload == "staged"):
            yield (
                "sampling.compile = cuda-graphs needs weights at fixed addresses; "
                "set sampling.merge_lora=false and execution.offload=none, or sampling.compile=regional"
            )
        if policy.base == "consistency":
            if self.vram is not None:
                yield "--vram plans for policy.base = network; leave it out and set the execution yourself"
            for name, value, needed in (
                ("policy.kind", policy.kind, "lora"),
                ("sampling.guidance_scale", self.sampling.guidance_scale, 1.0),
                ("objective.lookahead", self.objective.lookahead, "consistency"),
            ):
                if value != needed:
                    yield (
                        f"{name} = {value} is incompatible with policy.base = consistency, a LoRA on a model with "
                        f"distilled guidance that is its own look-ahead; set {name}={needed}"
                    )

    def _impossible_run(self) -> Iterator[str]:
        if taken := {"spec", "device", "dtype"} & self.reward_options.keys():
            yield f"reward_options.{min(taken)} cannot be set; it is the run's own reward, device or dtype"
        if self.vram is not None and self.algorithm != "sqdf":
            yield (
                f"--vram plans the steps of SQDF, and algorithm is {self.algorithm}; leave --vram out and set "
                "execution.micro_batch and execution.gradient_checkpointing"
            )
        if self.evaluation.points and self.limits == Limits():
            yield (
                f"evaluation.points = {self.evaluation.points} needs a limit to spread evaluations over; set "
                "limits.unet_evaluations or limits.seconds, or use evaluation.every"
            )
        if self.reads("replay.capacity") and self.replay.refill > self.replay.capacity:
            yield (
                f"replay.refill = {self.replay.refill} exceeds replay.capacity = {self.replay.capacity}; "
                "sample fewer trajectories a refill or enlarge the buffer"
            )


_CONDITIONS: dict[str, tuple[str, str]] = {
    "objective.lookahead_steps": ("objective.lookahead", "deterministic"),
    "objective.consistency_grid": ("objective.lookahead", "consistency"),
    "policy.rank": ("policy.kind", "lora"),
    "policy.alpha": ("policy.kind", "lora"),
    "policy.target_modules": ("policy.kind", "lora"),
    "sampling.eta": ("policy.base", "network"),
}
"""Settings that are read only with a certain value of another one."""


def without_effect(config: Config) -> dict[str, str]:
    """The settings that a run of this configuration does not read: dotted key to what they have no effect with."""
    reasons = {}
    values = dotted(config.model_dump())
    for key in values:
        if not config.reads(key):
            reasons[key] = f"algorithm = {config.algorithm} (only with {', '.join(readers(key))})"
        elif key in _CONDITIONS and values[_CONDITIONS[key][0]] != _CONDITIONS[key][1]:
            other, needed = _CONDITIONS[key]
            reasons[key] = f"{other} = {values[other]} (only with {needed})"
    return reasons
