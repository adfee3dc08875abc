"""One optimizer step and its sampling, run by the Runtime that trains on tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Config, Execution
from sqdf_fast.config import Optimizer as OptimizerSettings
from sqdf_fast.engine import ModuleGroups
from sqdf_fast.engine.meters import StageMeter
from sqdf_fast.engine.module_groups import ModuleGroup
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
        self.family = cast("Family", _FamilyWithoutFiles(family))
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
        modules: dict[ModuleGroup, nn.Module] = {"network": self.family.network, "decoder": self.family.vae}
        modules["reward"] = self.reward
        return {group: _bytes(t for t in _tensors(m) if not t.requires_grad) for group, m in modules.items()}

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
        batch, seeds = self._batch(samples, sampled)
        count = MemoryCount("meta", self._granularity, self._workspace)
        # The host's copies are made before anything is counted.
        runtime = self._runtime(execution, count, max(sampled, 1), merged, hollow)
        with flash_attention(), no_collection(), count:
            for module in self.modules:
                count.register_module(module)
            self._groups.counted_by(count)
            update = _Update(parameters, optimizer, count) if optimizer else None
            if sampled:
                self._sample(runtime, sampled, count)
            runtime.gradient(batch, seeds)
            runtime.enter("optimizer")
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
            backbone.family = cast("Family", _HollowFamily(self.family, weight))
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

    def _batch(self, samples: int, sampled: int) -> tuple[ReplayBatch, Tensor]:
        prompts = _prompts(samples)
        for prompt in ("", *_prompts(max(samples, sampled))):
            self.family.remember(prompt, self.family.example_conditioning(1))
        # On the host the states are half precision as in the buffer, or of another type than on the device: a copy.
        stored = torch.float32 if self.family.precision == torch.float64 else torch.float16
        x = torch.empty(samples, *self.family.latent_shape, dtype=stored, device=DEVICE)
        index = torch.zeros(samples, dtype=torch.long)
        return ReplayBatch(x, index, prompts, torch.arange(samples)), torch.arange(samples)


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
        if by_layer:
            with super().merged(role, by_layer=True):
                yield
            return
        with ExitStack() as stack:
            with self.count.counting("merging"):
                stack.enter_context(super().merged(role))
            yield


class _FamilyWithoutFiles:
    """A family that adds adapters of a LoRA's shape in place of loading its weights."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_lora(self, source: str, adapter_name: str) -> None:
        rank, targets = _lora_shape(source)
        self.network.add_adapter(LoraConfig(r=rank, target_modules=targets), adapter_name=adapter_name)


class _HollowFamily(_FamilyWithoutFiles):
    """A family whose network and decoder hold one huge block in place of their activations."""

    def __init__(self, family: Family, weight: Tensor) -> None:
        super().__init__(family)
        self._weight = weight

    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return hollow_call(x, self._weight, x.shape, self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        return hollow_call(latents, self._weight, (len(latents), 3, 1, 1), latents.dtype)


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
                self.uploads[stage] = self.uploads.get(stage, 0) + _bytes(tensors)


class _Update:
    """The optimizer, its states allocated from the start as in every step but the first.

    With states on the CPU nothing stays on the device; that step copies values and is not run. bitsandbytes' states
    have the names and sizes of the CPU's 8-bit AdamW.
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
            allocate_states(self.optimizer)
            for parameter in parameters:
                parameter.grad = None
            count.register(self._states(), "optimizer")

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()

    def _states(self) -> list[Tensor]:
        assert self.optimizer is not None
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, Tensor) and value.device == DEVICE]


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
