"""One optimizer step and its sampling, run by the Runtime that trains on tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Config, Execution
from sqdf_fast.config import Optimizer as OptimizerSettings
from sqdf_fast.engine import ModuleGroups
from sqdf_fast.engine.meters import StageMeter
from sqdf_fast.engine.module_groups import ALL_GROUPS, ModuleGroup
from sqdf_fast.engine.optimizers import allocate_states, make_optimizer
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.families import Conditioning, Family
from sqdf_fast.plan.fake import DEVICE, flash_attention, hollow_call, no_collection, to_meta
from sqdf_fast.plan.memory import CUDA_GRANULARITY, MemoryCount, StageCount, scaled
from sqdf_fast.plan.quantized import quantise
from sqdf_fast.plan.workspace import Workspace, on_cuda
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward
from sqdf_fast.rewards.checks import called

_LCM_RANK = 64
_LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of the published LCM-LoRAs (diffusers, examples/consistency_distillation, LoRA scripts)."""


@dataclass(frozen=True)
class Steps:
    """Counts of a simulated run.

    Attributes:
        stages: by name, in the order of the step.
        samples: samples of the optimizer step; sampled: trajectories sampled at once.
        uploads: bytes of frozen weights uploaded, by stage.
    """

    stages: dict[str, StageCount]
    samples: int
    sampled: int
    uploads: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Peak of the largest stage."""
        return max(stage.peak_bytes for stage in self.stages.values())


class Simulation:
    """A training setup on the meta device.

    Args:
        config: of the run; `run` takes its execution and batch sizes separately.
        family: model family on the meta device; reward: reward on the meta device.
        quantization: quantization of the frozen network.
        workspace, granularity: model of the simulated allocator, see MemoryCount.
        consistency: folder, file or hub id of the consistency LoRA; None: no such role.
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
        self.config, self.reward = config, reward

        def add_lora_like(source: str, adapter_name: str) -> None:
            rank, targets = _lora_shape(source)
            family.network.add_adapter(LoraConfig(r=rank, target_modules=targets), adapter_name=adapter_name)

        # No weights are loaded: an adapter of the LoRA's shape takes their place.
        self.family = _replaced(family, load_lora=add_lora_like)
        self._workspace, self._granularity = workspace, granularity
        if quantization != "none":
            quantise(family.network, quantization)
        policy = config.policy
        self.backbone = _Backbone(
            self.family,
            rank=policy.rank,
            kind=policy.kind,
            alpha=policy.alpha,
            target_modules=policy.target_modules,
            consistency_lora=consistency,
        )
        self._groups = _CountedGroups(self.backbone, reward)
        networks = {id(n): n for n in (self.backbone.network("policy"), family.network)}
        self.modules: tuple[nn.Module, ...] = (*networks.values(), family.vae, reward)
        replaced = to_meta(self.modules)
        parameters = self.backbone.policy_parameters
        for name, parameter in parameters.items():
            new = replaced[id(parameter)]
            assert isinstance(new, nn.Parameter)
            parameters[name] = new

    @property
    def rows(self) -> int:
        """Network rows a sample."""
        return 2 if self.family.guided and self.config.sampling.guidance_scale != 1 else 1

    def frozen_bytes(self) -> dict[ModuleGroup, int]:
        """Bytes of each group's frozen weights."""
        modules = zip(ALL_GROUPS, (self.family.network, self.family.vae, self.reward), strict=True)
        return {group: sum(t.nbytes for t in _tensors(m) if not t.requires_grad) for group, m in modules}

    def trained(self) -> tuple[int, int]:
        """Trained elements, and their bytes."""
        parameters = list(self.backbone.policy_parameters.values())
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

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
        """Count one optimizer step, and the sampling and decoding before it.

        Args:
            samples: samples of the optimizer step.
            sampled: trajectories sampled at once, by a single denoising step whose work is counted for all of them;
                0: none. As many images are decoded as ``execution`` decodes at once.
            merged: whether the LoRA is merged while sampling.
            optimizer: settings of the update, its states allocated from the start as in every step but the first;
                None: no update.
            hollow: network, decoder and reward hold one huge block in place of their activations. The difference
                of two such runs is what the step keeps beside them.
        """
        parameters = list(self.backbone.policy_parameters.values())
        for parameter in parameters:
            parameter.grad = None
        batch, seeds = self._batch(samples, sampled), torch.arange(samples)
        count = MemoryCount("meta", self._granularity, self._workspace)
        # The host's copies are made before anything is counted.
        runtime = self._runtime(execution, count, max(sampled, 1), merged, hollow)
        with flash_attention(), no_collection(), count:
            for module in self.modules:
                count.register_module(module)
            self._groups.counted_by(count)
            # With states on the CPU nothing stays on the device; that step copies values and is not run.
            on_device = optimizer if optimizer is not None and optimizer.states == "device" else None
            update = None if on_device is None else _optimizer(parameters, on_device, count)
            if sampled:
                self._sample(runtime, sampled, count)
            runtime.gradient(batch, seeds)
            runtime.enter("optimizer")
            if optimizer is not None:
                nn.utils.clip_grad_norm_(parameters, optimizer.max_grad_norm)
            if update is not None:
                update.step()
        uploads = self._groups.uploads
        self._groups.counted_by(None)
        self._groups.apply(Execution())
        if execution.offload == "staged":
            self._scatter()
        stages = {name: stage for name, stage in count.stages.items() if name}
        return Steps(stages, samples, sampled, uploads)

    def _runtime(self, execution: Execution, count: MemoryCount, sampled: int, merged: bool, hollow: bool) -> Runtime:
        # Neither compilation nor another memory layout is simulated.
        sampling = {"batch_size": sampled, "merge_lora": merged, "channels_last": False, "compile": "none"}
        sections = {"execution": execution, "sampling": self.config.sampling.model_copy(update=sampling)}
        config = self.config.model_copy(update={**sections, "impl": "reference"})
        backbone, reward = self.backbone, self.reward
        backbone.count = count
        if hollow:
            weight = next(iter(backbone.policy_parameters.values()))
            backbone, reward = copy.copy(backbone), _HollowReward(weight)
            backbone.family = _hollow(self.family, weight)
        return _Runtime(config, backbone, reward, groups=self._groups, meter=StageMeter(DEVICE, count))

    def _sample(self, runtime: Runtime, sampled: int, count: MemoryCount) -> None:
        # Every step of a trajectory costs the same.
        runtime.sample(_prompts(sampled), torch.arange(sampled), stop=1)
        stage = scaled(count.stages["sampling"], self.config.sampling.num_inference_steps)
        # The LoRA is merged once a refill, not once a step: its memory counts, its work is next to nothing.
        merging = count.stages.pop("merging", stage)
        worst = max(merging, stage, key=lambda stage: stage.peak_bytes)
        count.stages["sampling"] = replace(stage, peak_bytes=worst.peak_bytes, at_peak=worst.at_peak)
        family, images = self.family, runtime.execution.decode_images
        runtime.decode(torch.empty(images, *family.latent_shape, dtype=family.precision, device=DEVICE))

    def _scatter(self) -> None:
        """Offloaded weights come back as one block each: give every weight its own storage, whatever ran before."""
        for module in self.modules:
            for tensor in _tensors(module):
                tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    def _batch(self, samples: int, sampled: int) -> ReplayBatch:
        for prompt in ("", *_prompts(max(samples, sampled))):
            self.family.remember(prompt, self.family.example_conditioning(1))
        # On the host the states are half precision as in the buffer, or of another type than on the device: a copy.
        stored = torch.float32 if self.family.precision == torch.float64 else torch.float16
        x = torch.empty(samples, *self.family.latent_shape, dtype=stored, device=DEVICE)
        return ReplayBatch(x, torch.zeros(samples, dtype=torch.long), _prompts(samples), torch.arange(samples))


class _Runtime(Runtime):
    """Accepts rewards without values, which cannot be checked for being finite."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self.reward is not None
        return called(self.reward, images, prompts)


class _Backbone(Backbone):
    """Counts the merging of a LoRA as a stage of its own, except layer by layer."""

    count: MemoryCount

    @contextmanager
    def merged(self, role: Role, *, by_layer: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            with nullcontext() if by_layer else self.count.counting("merging"):
                stack.enter_context(super().merged(role, by_layer=by_layer))
            yield


def _replaced(family: Family, **methods: Any) -> Family:
    """A copy of a family with other methods."""
    copied = copy.copy(family)
    vars(copied).update(methods)
    return copied


def _hollow(family: Family, weight: Tensor) -> Family:
    """A family whose network and decoder hold one huge block in place of their activations."""

    def predict(network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return hollow_call(x, weight, x.shape, family.dtype)

    def decode(latents: Tensor) -> Tensor:
        return hollow_call(latents, weight, (len(latents), 3, 1, 1), latents.dtype)

    return _replaced(family, predict=predict, decode=decode)


class _HollowReward(Reward):
    """A reward that holds one huge block in place of its activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # In a tuple, so that it does not become a parameter of this module.
        self._weight = (weight,)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return hollow_call(images, *self._weight, (len(images),), torch.promote_types(images.dtype, torch.float32))


class _CountedGroups(ModuleGroups):
    """Counts the uploads of module groups, and their memory as weights."""

    def counted_by(self, count: MemoryCount | None) -> None:
        """Count from now on; None: stop."""
        self.count, self.uploads = count, dict[str, int]()

    def use(self, *names: ModuleGroup) -> None:
        if self._offload is None or self.count is None:
            return
        arriving = set(names) - self._offload.resident
        # Dropped weights are freed before others are uploaded.
        with self.count.exchange():
            super().use(*names)
            for name in arriving:
                tensors = [t for module in self._modules[name] for t in _tensors(module) if not t.requires_grad]
                self.count.register(tensors, "weights")
                stage = self.count.stage_name
                self.uploads[stage] = self.uploads.get(stage, 0) + sum(tensor.nbytes for tensor in tensors)


def _optimizer(
    parameters: list[nn.Parameter], settings: OptimizerSettings, count: MemoryCount
) -> torch.optim.Optimizer:
    """The optimizer, its states allocated from the start as in every step but the first.

    bitsandbytes' states have the names and sizes of the CPU's 8-bit AdamW.
    """
    kind = "adamw8bit" if settings.kind == "paged_adamw8bit" else settings.kind
    optimizer = make_optimizer(parameters, settings.model_copy(update={"kind": kind}), DEVICE)
    if isinstance(optimizer, torch.optim.AdamW):
        # As on CUDA; PyTorch does not offer it on the meta device.
        for group in optimizer.param_groups:
            group["fused"] = True
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    allocate_states(optimizer)
    for parameter in parameters:
        parameter.grad = None
    states = [value for state in optimizer.state.values() for value in state.values()]
    count.register((s for s in states if isinstance(s, Tensor) and s.device == DEVICE), "optimizer")
    return optimizer


def _prompts(number: int) -> list[str]:
    return [f"prompt {i}" for i in range(number)]


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
