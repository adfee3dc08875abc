"""Stable Diffusion 1.x/2.x and every pipeline of its format, the embedded shapes world included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from sqdf_fast.families.family import Conditioning, Defaults
from sqdf_fast.families.pipeline import PipelineFamily
from sqdf_fast.families.text import on_device, token_ids

_LCM_LORA_SD15 = "latent-consistency/lcm-lora-sdv1-5"
_SD15_TEXT_WIDTH = 768


class StableDiffusion(PipelineFamily):
    """A StableDiffusionPipeline: UNet, VAE (KL or tiny), one CLIP text encoder.

    Args:
        pipeline, resolution: see PipelineFamily.
        consistency_lora: where its consistency LoRA is; default: the published LCM-LoRA, for networks of SD1.x's width.
    """

    name: ClassVar[str] = "stable-diffusion"
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    network_part: ClassVar[Literal["unet", "transformer"]] = "unet"
    # The published SQDF runs.
    defaults: ClassVar[Defaults] = Defaults(num_inference_steps=50, guidance_scale=5.0, eta=1.0)

    def __init__(
        self, pipeline: StableDiffusionPipeline, resolution: int | None = None, consistency_lora: str | None = None
    ) -> None:
        super().__init__(pipeline, resolution)
        published = _LCM_LORA_SD15 if self.network.config.cross_attention_dim == _SD15_TEXT_WIDTH else None
        self._consistency_lora = consistency_lora or published

    @classmethod
    def loading_options(cls, index: dict[str, Any]) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

    def make_scheduler(self, scheduler: Any) -> Any:
        return stochastic_scheduler(scheduler)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        (encoder,), (tokenizer,) = self.encoders(prompts), self.tokenizers
        with on_device(encoder, self.device):
            states = encoder(token_ids(tokenizer, prompts, self.clip_tokens, encoder))[0]
        return Conditioning({"encoder_hidden_states": states.to(self.device, self.dtype)})

    def example_conditioning(self, batch: int) -> Conditioning:
        width = self.network.config.cross_attention_dim
        return Conditioning({"encoder_hidden_states": self.zeros(batch, self.clip_tokens, width)})

    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = network(x, timesteps, return_dict=False, **conditioning.tensors)[0]
        return output

    def lora_state(self, source: str) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
        state: tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]
        state = self.pipeline_class.lora_state_dict(source, return_lora_metadata=True)
        return state

    def default_consistency_lora(self) -> str | None:
        return self._consistency_lora


def stochastic_scheduler(scheduler: Any) -> Any:
    """The same noise levels with an affine stochastic step: DDIM, unless the pipeline has DDIM or DDPM already."""
    if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        return scheduler
    # PNDM, Euler, ... never clip, so clip_sample is set where their configuration leaves it out.
    clip = scheduler.config.get("clip_sample", False)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=clip)
