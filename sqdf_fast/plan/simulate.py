"""One optimizer step and its sampling, run by the code that trains on tensors without values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from sqdf_fast.backbone import Backbone, Role, Rows
from sqdf_fast.config import Config, Execution
from sqdf_fast.config import Optimizer as OptimizerSettings
from sqdf_fast.engine import ModuleGroups, make_executor
from sqdf_fast.engine.module_groups import ModuleGroup
from sqdf_fast.engine.optimizers import make_optimizer
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.families import Family
from sqdf_fast.plan.fake import DEVICE, flash_attention, hollow_call, no_collection, to_meta
from sqdf_fast.plan.memory import CUDA_GRANULARITY, MemoryCount, StageCount, scaled
from sqdf_fast.plan.quantized import quantise
from sqdf_fast.plan.workspace import Workspace, on_cuda
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward
from sqdf_fast.schedule import DenoisingSchedule

PARTS: tuple[ModuleGroup, ...] = ("network", "decoder", "reward")

_LCM_RANK = 64
_LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of the published LCM-LoRAs (diffusers, examples/consistency_distillation, LoRA scripts)."""

_PER_STEP = (
    *("timesteps", "levels", "transition", "posterior", "lookahead", "lookahead_timesteps", "lookahead_levels"),
    "trainable",
)


@dataclass(frozen=True)
class Steps:
    """What a simulated run counted.

    Attributes:
        stages: by name, in the order of the step; samples: of the optimizer step; sampled: of the sampler's batch.
        uploads: bytes of frozen weights brought to the device, by stage.
    """

    stages: dict[str, StageCount]
    samples: int
    sampled: int
    uploads: dict[str, int]

    def as_values(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_values(values: dict[str, Any]) -> Steps:
        """What `as_values` gave."""
        stages = {name: StageCount(**stage) for name, stage in values["stages"].items()}
        return Steps(stages, values["samples"], values["sampled"], values["uploads"])

    @property
    def peak_bytes(self) -> int:
        """The most that any stage holds."""
        return max(stage.peak_bytes for stage in self.stages.values())


class Simulation:
    """A training setup on the meta device.

    Args:
        config: of the run; its execution and batch sizes are given to `run` instead.
        family, reward: on the meta device.
        quantization: of the frozen network.
        workspace, granularity: of the simulated device, see MemoryCount.
        consistency: source of the consistency LoRA, or None without one.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        reward: Reward,
        *,
        quantization: str = "none",
        workspace: Workspace = on_cuda,
        granularity: int = CUDA_GRANULARITY,
        consistency: str | None = None,
    ) -> None:
        self.config, self.family, self.reward = config, family, reward
        self._workspace, self._granularity = workspace, granularity
        if quantization != "none":
            quantise(family.network, quantization)
        family.load_lora = _add_adapter(family)  # type: ignore[method-assign]
        policy = config.policy
        self.backbone = Backbone(
            family,
            rank=policy.rank,
            kind=policy.kind,
            alpha=policy.alpha,
            target_modules=policy.target_modules,
            consistency_lora=consistency,
        )
        self.guidance_scale = config.sampling.guidance_scale if family.guided else 1.0
        self.schedule = family.schedule(config.sampling.num_inference_steps, config.sampling.eta)
        self._parts = _CountedGroups(self.backbone, reward)
        networks = {id(n): n for n in (self.backbone.network("policy"), family.network)}
        self.modules: tuple[nn.Module, ...] = (*networks.values(), family.vae, reward)
        replaced = to_meta(self.modules)
        parameters = self.backbone.policy_parameters
        for name, parameter in parameters.items():
            new = replaced[id(parameter)]
            assert isinstance(new, nn.Parameter)
            parameters[name] = new
        family.device = DEVICE

    @property
    def rows(self) -> int:
        """Network rows a sample."""
        return 1 if self.guidance_scale == 1 else 2

    def frozen_bytes(self) -> dict[ModuleGroup, int]:
        """Bytes of each part's frozen weights."""
        modules: dict[ModuleGroup, nn.Module] = {"network": self.family.network, "decoder": self.family.vae}
        modules["reward"] = self.reward
        return {part: _bytes(t for t in _tensors(m) if not t.requires_grad) for part, m in modules.items()}

    def trained(self) -> tuple[int, int]:
        """Trained elements, and their bytes."""
        parameters = list(self.backbone.policy_parameters.values())
        return sum(p.numel() for p in parameters), _bytes(parameters)

    def run(
        self,
        execution: Execution,
        samples: int,
        *,
        sampled: int = 0,
        merged: bool = True,
        optimizer: OptimizerSettings | None = None,
        hollow: bool = False,
    ) -> Steps:
        """Count one optimizer step of ``samples`` samples, and sampling ``sampled`` trajectories, the LoRA ``merged``.

        Sampling runs a single denoising step; its work is counted as the whole trajectory's. With ``optimizer``, its
        states exist throughout as in every step but the first. ``hollow``: network, decoder and reward hold one huge
        block in place of their activations; what such runs differ in is what the step keeps beside them.
        """
        for parameter in self.backbone.policy_parameters.values():
            parameter.grad = None
        batch, seeds = self._batch(samples, sampled)
        # The host's copies are made before anything is counted.
        self._parts.apply(execution)
        count = MemoryCount("meta", self._granularity, self._workspace)
        with flash_attention(), no_collection(), self._hollowed() if hollow else nullcontext(), count:
            for module in self.modules:
                count.register_module(module)
            self._parts.counted_by(count)
            update = _Update(list(self.backbone.policy_parameters.values()), optimizer, count) if optimizer else None
            if sampled:
                self._sample(sampled, merged, count)
            executor = make_executor(
                self.backbone,
                # Its copies on the device are made anew, so that no run owes another its tables.
                replace(self.schedule, _copies={}),
                self.reward,
                self.config.objective,
                guidance_scale=self.guidance_scale,
                execution=execution,
                groups=self._parts,
                impl="reference",
            )
            executor.on_stage = count.stage
            result = executor.accumulate(batch, seeds)
            del result
            count.stage("optimizer")
            if update is not None:
                update.step()
        uploads = self._parts.uploads
        self._parts.counted_by(None)
        self._parts.apply(Execution())
        if execution.offload == "staged":
            self._scatter()
        stages = {name: stage for name, stage in count.stages.items() if name}
        return Steps(stages, samples, sampled, uploads)

    @contextmanager
    def _hollowed(self) -> Iterator[None]:
        weight = next(iter(self.backbone.policy_parameters.values()))
        family = self.family

        def network(rows: Rows) -> Tensor:
            return hollow_call(rows.x, weight, rows.x.shape, family.dtype)

        def decode(latents: Tensor) -> Tensor:
            return hollow_call(latents, weight, (len(latents), 3, 1, 1), latents.dtype)

        def score(images: Tensor, prompts: list[str]) -> Tensor:
            return hollow_call(images, weight, (len(images),), torch.promote_types(images.dtype, torch.float32))

        with (
            mock.patch.object(self.backbone, "run", network),
            mock.patch.object(family, "decode", decode),
            mock.patch.object(self.reward, "forward", score),
        ):
            yield

    def _scatter(self) -> None:
        """ModuleGroups come back as one block each: give every weight its own storage again, whatever ran before."""
        for module in self.modules:
            for tensor in _tensors(module):
                tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    def _batch(self, samples: int, sampled: int) -> tuple[ReplayBatch, Tensor]:
        prompts = _prompts(samples)
        for prompt in ("", *_prompts(max(samples, sampled))):
            self.family.remember(prompt, self.family.example_conditioning(1))
        # On the host the states are half precision as in the buffer, or of another type than on the device: a copy.
        stored = torch.float32 if self.family.precision == torch.float64 else torch.float16
        x = torch.empty(samples, *self.family.latent_shape, dtype=stored, device=DEVICE)
        index = torch.zeros(samples, dtype=torch.long)
        return ReplayBatch(x, index, prompts, torch.arange(samples)), torch.arange(samples)

    def _sample(self, sampled: int, merged: bool, count: MemoryCount) -> None:
        count.stage("sampling")
        self._parts.use("network")
        steps, eta = self.config.sampling.num_inference_steps, self.config.sampling.eta
        sampler = Sampler(
            self.backbone,
            self._one_step(eta),
            guidance_scale=self.guidance_scale,
            batch_size=sampled,
            merge_lora=merged,
            impl="reference",
        )
        with mock.patch.object(self.backbone, "merged", self._merged_apart(count)):
            x0 = sampler.sample(_prompts(sampled), torch.arange(sampled)).x0
        stage = scaled(count.stages["sampling"], steps)
        # The LoRA is merged once a refill, not once a step: its memory counts, its work is next to nothing.
        merging = count.stages.pop("merging", stage)
        worst = max(merging, stage, key=lambda stage: stage.peak_bytes)
        count.stages["sampling"] = replace(stage, peak_bytes=worst.peak_bytes, at_peak=worst.at_peak)
        count.stage("sampled pictures")
        self._parts.use("decoder")
        with torch.no_grad():
            self.family.decode(x0.to(self.family.dtype))

    def _merged_apart(self, count: MemoryCount) -> Any:
        """`Backbone.merged` with its entry as a stage of its own."""
        merged = self.backbone.merged

        @contextmanager
        def apart(role: Role) -> Iterator[None]:
            with ExitStack() as stack:
                with count.counting("merging"):
                    stack.enter_context(merged(role))
                yield

        return apart

    def _one_step(self, eta: float) -> DenoisingSchedule:
        # Every step of a trajectory costs the same.
        tables = {name: getattr(self.schedule, name)[:1] for name in _PER_STEP}
        return replace(self.schedule, **tables, _copies={})


class _CountedGroups(ModuleGroups):
    """ModuleGroups whose uploads are counted, and known as weights."""

    def counted_by(self, count: MemoryCount | None) -> None:
        """From now on."""
        self.count, self.uploads = count, dict[str, int]()

    def use(self, *names: ModuleGroup) -> None:
        if self._offload is None or self.count is None:
            return
        arriving = set(names) - self._offload.resident
        # ModuleGroups that leave do so before others come.
        with self.count.exchange():
            super().use(*names)
            for name in arriving:
                tensors = [t for module in self._modules[name] for t in _tensors(module) if not t.requires_grad]
                self.count.register(tensors, "weights")
                stage = self.count.stage_name
                self.uploads[stage] = self.uploads.get(stage, 0) + _bytes(tensors)


class _Update:
    """The optimizer and its states, there from the start as in every step but the first.

    States on the CPU leave nothing on the device, and their step is not run: it copies values. bitsandbytes' states
    are those of the CPU's 8-bit AdamW, name by name.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: OptimizerSettings, count: MemoryCount) -> None:
        self.parameters, self.settings = parameters, settings
        self.optimizer = None
        if settings.states == "device":
            kind = "adamw8bit" if settings.kind == "paged_adamw8bit" else settings.kind
            self.optimizer = make_optimizer(parameters, settings.model_copy(update={"kind": kind}), DEVICE)
            if isinstance(self.optimizer, torch.optim.AdamW):
                # As on CUDA; PyTorch does not offer it on the meta device.
                for group in self.optimizer.param_groups:
                    group["fused"] = True
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            self._update()
            for parameter in parameters:
                parameter.grad = None
            count.register(self._states(), "optimizer")
            # That first step is none of the counted ones.
            count.forget_stage("")

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if self.optimizer is not None:
            self._update()

    def _update(self) -> None:
        assert self.optimizer is not None
        with mock.patch("torch.optim.adam._device_dtype_check_for_fused"):
            self.optimizer.step()

    def _states(self) -> list[Tensor]:
        assert self.optimizer is not None
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, Tensor) and value.device == DEVICE]


def _prompts(number: int) -> list[str]:
    return [f"prompt {i}" for i in range(number)]


def _add_adapter(family: Family) -> Any:
    """In place of loading a LoRA file: an adapter of its shape."""

    def add(source: str, adapter_name: str) -> None:
        rank, targets = _lora_shape(source)
        family.network.add_adapter(LoraConfig(r=rank, target_modules=targets), adapter_name=adapter_name)

    return add


def _lora_shape(source: str) -> tuple[int, list[str]]:
    path = Path(source)
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.safetensors"))), path)
    if not path.is_file():
        return _LCM_RANK, list(_LCM_TARGETS)
    with safe_open(path, "pt") as file:
        down = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118
        rank = max(file.get_slice(key).get_shape()[0] for key in down)
    return rank, [key.removesuffix(".lora_A.weight").partition(".")[2] for key in down]


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
