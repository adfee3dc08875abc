"""The models of a problem, and every way to run its step as something to call."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.meters import Watch
from peft import LoraConfig
from torch import Tensor, nn

from cases.training_step.problem import OURS, PUBLISHED, Problem
from cases.training_step.published import NO_QUIRKS, Published
from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Config, Execution, Objective, make_config
from sqdf_fast.engine import ModuleGroups
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.families import Conditioning, Family, family_from_configs, load_family
from sqdf_fast.families.loading import known_model
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward, load_reward, reward_from_config

OBJECTIVE = Objective(alpha=2.0, gamma=0.9, lookahead="consistency")
_PROMPTS = ("a red circle", "a blue square", "a green star", "a yellow triangle")
_LORA_NOISE = 0.02
# The published LCM-LoRAs.
_CONSISTENCY_LORA = LoraConfig(
    r=64,
    lora_alpha=64,
    target_modules=[
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ],
)
_NARROW_VAE = {"sample_size": 64, "layers_per_block": 1, "block_out_channels": [32, 32, 32, 32]}
_NARROW_UNET: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 2},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
    },
}


@dataclass(frozen=True)
class Step:
    """A way to run the step."""

    prepare: Callable[[], None]  # what happens untimed before each run
    call: Callable[[], Any]  # a run: adds the batch's gradient to `parameters`
    parameters: list[nn.Parameter]  # the policy's
    modules: tuple[nn.Module, ...]  # the modules whose weights it needs
    watch: Watch  # how it announces its stages

    def gradient(self) -> Tensor:
        """The gradient of one run, in float64 on the CPU, all parameters in one vector."""
        self.prepare()
        self.call()
        return torch.cat([parameter.grad.flatten().double().cpu() for parameter in self.parameters])


class Ours:
    """A family with its backbone, its reward and the executors that share them.

    Args:
        problem: model and sizes.
        dtype: dtype of the arithmetic. The weights are exactly those of the problem's dtype, so that a wider one gives
            the gradient that the problem's own is compared with.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        self.problem, dtype = problem, dtype or problem.dtype
        self.family = _family(problem)
        self.reward = _reward(problem)
        if dtype != problem.dtype:
            for module in (self.family.network, self.family.vae, self.reward):
                nn.Module.to(module, dtype=dtype)
            self.family.dtype = dtype
        _encode(self.family, dtype)
        self.backbone = self._backbone()
        self.groups = ModuleGroups(self.backbone, self.reward)
        self.schedule = self.family.schedule(problem.steps, 1.0)
        # The last index, a twentieth or a fiftieth of all draws, has no look-ahead here: it would flatter us.
        index = torch.linspace(0, problem.steps - 2, problem.batch + 2)[1:-1].long()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(problem.batch, *self.family.latent_shape, generator=generator).to(self.family.precision)
        prompts = [_PROMPTS[number % len(_PROMPTS)] for number in range(problem.batch)]
        self.batch = ReplayBatch(x, index, prompts, torch.arange(problem.batch))
        self.seeds = torch.arange(problem.batch) * 1_000_003 + 17

    def step(self, name: str) -> Step:
        """A runtime by its name in OURS."""
        settings = configuration(self.problem).model_copy(update={"execution": execution(self.problem, name)})
        runtime = Runtime(settings, self.backbone, self.reward, groups=self.groups, meter=_no_meter)
        return self._step(
            lambda: runtime.gradient(self.batch, self.seeds),
            list(self.backbone.policy_parameters.values()),
            (self.family.network, self.family.vae, self.reward),
            settings.execution,
            partial(setattr, runtime, "meter"),
        )

    def published(self) -> Step:
        """The published way on the same weights, in three networks of its own."""
        problem, family, prompts = self.problem, self.family, self.batch.prompts
        networks = _networks(self)
        published = Published(
            *networks,
            family.vae,
            self.reward,
            family.scheduler,
            num_inference_steps=problem.steps,
            alpha=OBJECTIVE.alpha,
            gamma=OBJECTIVE.gamma,
            guidance_scale=problem.guidance_scale,
            quirks=NO_QUIRKS,
            device=family.device,
        )
        both = Conditioning.cat([family.encode([""]).expand(problem.batch), family.encode(prompts)])
        noise = philox_normal(self.seeds, family.latent_shape, dtype=family.precision).to(family.device)
        trained = dict(networks[0].named_parameters())
        return self._step(
            lambda: published.accumulate(
                self.batch.x.to(family.device), self.batch.index.to(family.device), both.tensors, prompts, noise
            ),
            [trained[name] for name in self.backbone.policy_parameters],
            (*networks, family.vae, self.reward),
            # Decoder and reward are the modules that ours has: no checkpoint in them either.
            Execution(),
            partial(setattr, published, "on_stage"),
        )

    def _step(
        self, call: Callable[[], Any], parameters: list[nn.Parameter], modules: Any, settings: Execution, watch: Watch
    ) -> Step:
        def prepare() -> None:
            self.groups.apply(settings)
            for parameter in parameters:
                parameter.grad = None

        return Step(prepare, call, parameters, modules, watch)

    def _backbone(self) -> Backbone:
        """The LoRAs away from zero; the consistency LoRA is the model's own where its weights are."""
        family, own = self.family, self.problem.model == "shapes"
        if not own:
            family.network.add_adapter(_CONSISTENCY_LORA, adapter_name="consistency")
        source = family.default_consistency_lora() if own else None
        backbone = Backbone(family, rank=configuration(self.problem).policy.rank, consistency_lora=source)
        backbone.has_consistency = True
        randomized = (".policy.",) if own else (".policy.", ".consistency.")
        named = family.network.named_parameters()
        _randomize({name: parameter for name, parameter in named if any(adapter in name for adapter in randomized)})
        return backbone


def configuration(problem: Problem) -> Config:
    """The run whose step is measured. The rank of the policy's LoRA is the shipped preset's, elsewhere the paper's."""
    settings = {
        "model": problem.model,
        "reward": problem.reward,
        "sampling": {"num_inference_steps": problem.steps, "guidance_scale": problem.guidance_scale, "eta": 1.0},
        "objective": OBJECTIVE.model_dump(exclude_unset=True),
        "policy": {"rank": 8 if problem.model == "shapes" else 4},
    }
    return make_config(flags=settings)


def execution(problem: Problem, name: str) -> Execution:
    """The settings of one of OURS."""
    return Execution(
        micro_batch=problem.batch,
        forward_batch_rows=problem.forward_batch_rows,
        backward_batch_rows=problem.backward_batch_rows,
        decode_images=problem.decode_images,
        **OURS[name],
    )


def make(problem: Problem) -> dict[str, Step]:
    """Every way to run the problem's step, by name. Weights that move have modules of their own."""
    ours, moving = Ours(problem), Ours(problem)
    steps = {PUBLISHED: ours.published()}
    for name, settings in OURS.items():
        steps[name] = (moving if "offload" in settings else ours).step(name)
    return steps


def _family(problem: Problem) -> Family:
    device = torch.device(problem.device)
    if problem.model == "shapes":
        return load_family("shapes", device=device, dtype=problem.dtype)
    torch.manual_seed(0)
    return architecture(problem, device)


def architecture(problem: Problem, device: torch.device) -> Family:
    """The model with random weights; in toy sizes its classes a tenth as wide, for images of 64 x 64."""
    if not problem.toy or problem.model == "shapes":
        return family_from_configs(problem.model, device=device, dtype=problem.dtype)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(known_model(problem.model), folder, dirs_exist_ok=True)
        unet = {"sample_size": 8, "layers_per_block": 1, **_NARROW_UNET[problem.model]}
        for part, changes in (("unet", unet), ("vae", _NARROW_VAE)):
            file = Path(folder, part, "config.json")
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return family_from_configs(folder, device=device, dtype=problem.dtype)


def _reward(problem: Problem) -> Reward:
    if problem.model == "shapes":
        return load_reward(problem.reward, device=problem.device, dtype=problem.dtype)
    torch.manual_seed(1)
    return reward_from_config(problem.reward, device=problem.device, dtype=problem.dtype)


def _encode(family: Family, dtype: torch.dtype) -> None:
    """Remember the embeddings of all prompts, random for a model without text encoders, and release the encoders."""
    generator = torch.Generator().manual_seed(2)
    for prompt in ("", *_PROMPTS):
        if family.text_encoders:
            tensors = family.encode_prompts([prompt]).tensors
        else:
            zeros = family.example_conditioning(1).tensors
            tensors = {name: torch.randn(zero.shape, generator=generator).bfloat16() for name, zero in zeros.items()}
        family.remember(prompt, Conditioning({name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}))
    family.release_text_encoders()


def _randomize(parameters: dict[str, nn.Parameter]) -> None:
    """Random values that bfloat16 holds exactly: the same in every precision."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(parameters):
            noise = _LORA_NOISE * torch.randn(parameters[name].shape, generator=generator)
            parameters[name].copy_(noise.bfloat16())


def _networks(ours: Ours) -> list[Any]:
    """Policy, reference and consistency model: three copies of the network, each with the adapter it needs alone."""
    reference = _family(ours.problem).network
    nn.Module.to(reference, dtype=ours.family.dtype)
    found = [copy.deepcopy(reference), reference, copy.deepcopy(reference)]
    given = dict(ours.family.network.named_parameters())
    for network, adapter in ((found[0], "policy"), (found[2], "consistency")):
        network.add_adapter(ours.family.network.peft_config[adapter], adapter_name=adapter)
        for name, parameter in network.named_parameters():
            if f".{adapter}." in name:
                parameter.data = given[name].data.clone()
                parameter.requires_grad_(adapter == "policy")
    return found


def _no_meter(stage: str) -> None:
    """In place of the runtime's meter, which resets the peak that is measured here."""
