"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, a pooled embedding, the image's size as conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.families.family import Conditioning, Defaults, Family, cast
from sqdf_fast.families.stable_diffusion import stochastic_scheduler
from sqdf_fast.families.text import on_device, penultimate, token_ids

_SIZES = 6
"""Original height and width, crop top and left, target height and width."""


class StableDiffusionXL(Family):
    """A StableDiffusionXLPipeline.

    The unconditional prompt '' is zeros under the pipeline's force_zeros_for_empty_prompt, as when no negative
    prompt is given to it. Images count as uncropped and of the size they are made in.

    Args:
        pipeline, resolution, consistency_lora: see Family. In float16 its VAE overflows: with force_upcast in
            its configuration it is kept, and decodes, in float32.
    """

    name = "stable-diffusion-xl"
    pipeline_class = StableDiffusionXLPipeline
    network_part = "unet"
    # The pipeline's own defaults.
    defaults = Defaults(num_inference_steps=50, guidance_scale=5.0, eta=1.0)
    make_scheduler = staticmethod(stochastic_scheduler)
    published_consistency_lora = ("latent-consistency/lcm-lora-sdxl", 2048)

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, resolution: int | None = None, consistency_lora: str | None = None
    ) -> None:
        super().__init__(pipeline, resolution, consistency_lora)
        self._zero_unconditional = bool(pipeline.config.force_zeros_for_empty_prompt)
        if self.vae.config.get("latents_mean") is not None:
            raise UserError("this SDXL model's VAE has latents_mean, as Playground v2.5 does; allowed: SDXL's own VAE")
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            cast(self.vae, torch.float32)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        states = []
        for encoder, tokenizer in zip(self.encoders(prompts), self.tokenizers, strict=True):
            with on_device(encoder, self.device):
                ids = token_ids(tokenizer, prompts, tokenizer.model_max_length, encoder)
                hidden, pooled = penultimate(encoder, ids)
            states.append(hidden.to(self.device, self.dtype))
        # The pooled embedding is the last encoder's.
        pooled = pooled.to(self.device, self.dtype)
        tensors = {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": pooled}
        if self._zero_unconditional:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=pooled.device)
            for name, tensor in tensors.items():
                tensors[name] = tensor.masked_fill(empty.view(-1, *[1] * (tensor.ndim - 1)), 0)
        size = float(self.resolution)
        row = torch.tensor([size, size, 0, 0, size, size], device=self.device, dtype=self.dtype)
        return Conditioning({**tensors, "time_ids": row.repeat(len(prompts), 1)})

    def example_conditioning(self, batch: int) -> Conditioning:
        config = self.network.config
        pooled = config.projection_class_embeddings_input_dim - _SIZES * config.addition_time_embed_dim
        return Conditioning(
            {
                "encoder_hidden_states": self.zeros(batch, self.clip_tokens, config.cross_attention_dim),
                "text_embeds": self.zeros(batch, pooled),
                "time_ids": self.zeros(batch, _SIZES),
            }
        )

    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = dict(conditioning.tensors)
        states = tensors.pop("encoder_hidden_states")
        return network(x, timesteps, states, added_cond_kwargs=tensors, return_dict=False)[0]

    def lora_options(self) -> dict[str, Any]:
        return {"unet_config": self.network.config}
