"""Stable Diffusion 1.x/2.x and every pipeline of its format, the embedded shapes world included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from sqdf_fast.families.family import Conditioning, Defaults, Family
from sqdf_fast.families.text import on_device, token_ids


def stochastic_scheduler(scheduler: Any) -> Any:
    """The same noise levels with an affine stochastic step: DDIM, unless the pipeline has DDIM or DDPM already."""
    if isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
        return scheduler
    # PNDM, Euler, ... never clip, so clip_sample is set where their configuration leaves it out.
    return DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))


class StableDiffusion(Family):
    """A StableDiffusionPipeline: UNet, VAE (KL or tiny), one CLIP text encoder; see Family."""

    name = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline
    network_part = "unet"
    # The published SQDF runs.
    defaults = Defaults(num_inference_steps=50, guidance_scale=5.0, eta=1.0)
    make_scheduler = staticmethod(stochastic_scheduler)
    published_consistency_lora = ("latent-consistency/lcm-lora-sdv1-5", 768)

    @classmethod
    def loading_options(cls, index: dict[str, Any]) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

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
