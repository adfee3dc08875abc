"""What the tests of DRaFT, DRaFT-LV and ReFL share: a tiny world in float64, and plain diffusers beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch.func import functional_call

from sqdf_fast.algorithms import make_algorithm
from sqdf_fast.algorithms.base import Algorithm
from sqdf_fast.config import ALGORITHM_SETTINGS, Config, make_config, section_of
from sqdf_fast.engine.loading import load_backbone
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.rewards.base import FunctionReward

STEPS, GUIDANCE, BATCH = 4, 3.0, 5
PROMPTS = ["a red star", "a blue ring", "a ring", "a star", "a red ring"]


def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Not linear in the picture, not the same for every prompt, and of both signs."""
    direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    length = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float64)
    return length * (direction.to(images) * (3 * images - 1.3).sin()).flatten(1).mean(1)


def settings(model: Path, algorithm: str, own: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> Config:
    """A small run; of ``own``, values for the algorithm's own section, it takes those that the section has."""
    fields = ALGORITHM_SETTINGS[algorithm].model_fields
    values: dict[str, Any] = {
        "model": str(model),
        "algorithm": algorithm,
        "dtype": "float64",
        "sampling": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "batch_size": 3},
        "objective": {"alpha": 0.3} if "objective.alpha" in ALGORITHM_SETTINGS[algorithm].reads else {},
        "policy": {"rank": 2},
        "optimizer": {"batch_size": BATCH},
        "execution": {"micro_batch": BATCH},
        **({section_of(algorithm): {name: own[name] for name in own if name in fields}} if fields else {}),
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(file=values)


def make(config: Config, *, stirred: bool = True) -> Algorithm:
    """The algorithm of a configuration, its policy other than the reference unless ``stirred`` is off."""
    backbone = load_backbone(config)
    if stirred:
        with torch.no_grad():
            for number, parameter in enumerate(backbone.policy_parameters.values()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    return make_algorithm(config, Runtime(config, backbone, FunctionReward(score, "score", {})), PROMPTS)


def gradient(algorithm: Algorithm, step: int = 2) -> dict[str, torch.Tensor]:
    """Of one optimizer step, by the parameters' names."""
    algorithm.collect(step)
    algorithm.accumulate(step)
    parameters = algorithm.backbone.policy_parameters
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The difference's norm over the second's."""
    assert one.keys() == two.keys()
    flat = [torch.cat([found[name].flatten() for name in two]) for found in (one, two)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


class Published:
    """Plain diffusers and autograd: nothing of this project but its noise, so that both see the same."""

    def __init__(self, model: Path, algorithm: Algorithm, **scheduler: Any) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=torch.float64)
        self.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config, **scheduler)
        # Its tables are float32; arithmetic on them in float64 is what ours does.
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.scheduler.final_alpha_cumprod = self.scheduler.final_alpha_cumprod.double()
        self.scheduler.set_timesteps(STEPS)
        self.base = dict(self.pipe.unet.named_parameters())
        self.lora = {
            name: parameter.detach().clone().requires_grad_(True)
            for name, parameter in algorithm.backbone.policy_parameters.items()
        }
        self.prompts, self.seeds = algorithm.draw_prompts(2, BATCH)

    def weights(self) -> dict[str, torch.Tensor]:
        """W + B A for every adapted layer (LoRA alpha = rank)."""
        merged = dict(self.base)
        for name, down in self.lora.items():
            if ".lora_A." in name:
                layer = name.split(".lora_A.")[0]
                up = self.lora[name.replace(".lora_A.", ".lora_B.")]
                merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + up @ down
        return merged

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.pipe.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=8, return_tensors="pt"
        )
        with torch.no_grad():
            return self.pipe.text_encoder(tokens.input_ids)[0]

    def predict(self, weights, x, t, rows=slice(None)) -> torch.Tensor:
        prompts = self.prompts[rows]
        states = torch.cat([self.embed([""] * len(prompts)), self.embed(prompts)])
        output = functional_call(
            self.pipe.unet, weights, (torch.cat([x, x]), t), {"encoder_hidden_states": states}
        ).sample
        unconditional, conditional = output.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    def noise(self, *purpose: int, rows=slice(None)) -> torch.Tensor:
        return philox_normal(derive_seeds(*purpose, ids=self.seeds[rows]), (4, 8, 8), dtype=torch.float64)

    def step(self, x, eps, i, noise, rows=slice(None)):
        """DDIM with eta = 1; ``noise`` a factor of the step's own."""
        z = noise * self.noise(Stream.DENOISING, i, rows=rows)
        return self.scheduler.step(eps, self.scheduler.timesteps[i], x, eta=1.0, variance_noise=z)

    def state(self, stop: int, rows=slice(None)) -> torch.Tensor:
        """x at index ``stop``, without a gradient."""
        x, weights = self.noise(Stream.INITIAL, rows=rows), self.weights()
        with torch.no_grad():
            for i in range(stop):
                eps = self.predict(weights, x, self.scheduler.timesteps[i], rows)
                x = self.step(x, eps, i, 1.0, rows).prev_sample
        return x

    def reward(self, x0: torch.Tensor, rows=slice(None)) -> torch.Tensor:
        images = self.pipe.vae.decode(x0 / self.pipe.vae.config.scaling_factor).sample
        return score((images / 2 + 0.5).clamp(0, 1), self.prompts[rows])

    def gradient(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.lora, torch.autograd.grad(loss, list(self.lora.values())), strict=True))
