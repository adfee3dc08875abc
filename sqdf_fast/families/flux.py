"""FLUX.1: a guidance-distilled rectified-flow transformer over packed latents, with a CLIP and a T5 encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.families.family import Conditioning, Defaults
from sqdf_fast.families.flow import FlowFamily, shift
from sqdf_fast.families.text import on_device, token_ids
from sqdf_fast.schedule import DenoisingSchedule

_T5_TOKENS = 512
_BLOCKS = frozenset({"FluxTransformerBlock", "FluxSingleTransformerBlock"})
_TRAINED_SIDE = 128
"""Latent rows and columns of the pipeline's default image; its configuration does not say."""


class Flux(FlowFamily):
    """A FluxPipeline. Latents are packed: one sample is [L, 4 C], a row a patch of 2 x 2 latent positions.

    The guidance scale is an input of the network, the same for every sample; classifier-free guidance does not apply.

    Args:
        pipeline, resolution: see Family.
        embedded_guidance: that input; ignored by networks without it (FLUX.1-schnell).

    Raises:
        UserError: the pipeline has only one of its two text encoders.
    """

    name = "flux"
    pipeline_class = FluxPipeline
    guided = False
    # Steps: the pipeline's usual 28; noise level: Flow-GRPO's experiments with FLUX.1-dev.
    defaults = Defaults(num_inference_steps=28, guidance_scale=1.0, eta=0.9)
    checkpointed_block_types = FlowFamily.checkpointed_block_types | {"network": _BLOCKS}

    def __init__(self, pipeline: FluxPipeline, resolution: int | None = None, embedded_guidance: float = 3.5) -> None:
        super().__init__(pipeline, resolution)
        if len(self.text_encoders) == 1:
            raise UserError(
                "this FLUX model has one text encoder; it needs both text_encoder (CLIP) and text_encoder_2 (T5)"
            )
        self.embedded_guidance = embedded_guidance

    def trained_latent_side(self) -> int:
        return _TRAINED_SIDE

    def latent_layout(self, side: int) -> tuple[int, ...]:
        return ((side // self.patch) ** 2, self.network.config.in_channels)

    def schedule(self, num_inference_steps: int, eta: float) -> DenoisingSchedule:
        # Levels in even steps from 1 to 1 / T before the shift, unlike the scheduler's own default.
        levels = torch.linspace(1, 1 / max(num_inference_steps, 1), num_inference_steps, dtype=torch.float64)
        mu = shift(self.scheduler, self.latent_shape[0])
        return DenoisingSchedule.from_scheduler(self.scheduler, num_inference_steps, eta, sigmas=levels.tolist(), **mu)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        (clip, t5), (short, long) = self.encoders(prompts), self.tokenizers
        with on_device(clip, self.device):
            pooled = clip(token_ids(short, prompts, self.clip_tokens, clip)).pooler_output
        with on_device(t5, self.device):
            states = t5(token_ids(long, prompts, _T5_TOKENS, t5))[0]
        tensors = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return Conditioning({name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()})

    def example_conditioning(self, batch: int) -> Conditioning:
        config = self.network.config
        return Conditioning(
            {
                "encoder_hidden_states": self.zeros(batch, _T5_TOKENS, config.joint_attention_dim),
                "pooled_projections": self.zeros(batch, config.pooled_projection_dim),
            }
        )

    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.embedded_guidance, device=x.device, dtype=torch.float32)
        return network(
            x,
            # Rounded before the division, as the pipeline does: the network multiplies by 1000 again.
            timestep=timesteps.to(x.dtype) / 1000,
            guidance=guidance,
            txt_ids=x.new_zeros(tensors["encoder_hidden_states"].shape[1], 3),
            img_ids=self.image_ids(x),
            return_dict=False,
            **tensors,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        rows = math.isqrt(self.latent_shape[0])
        # [B, L, 4 C] -> [B, C, 2 rows, 2 rows]; a row of L holds channel, then the patch's row and column.
        patches = latents.unflatten(2, (-1, self.patch, self.patch)).unflatten(1, (rows, rows))
        return super().decode(patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3))

    def lora_options(self) -> dict[str, Any]:
        return {"return_alphas": True}

    def image_ids(self, x: Tensor) -> Tensor:
        """Positions [L, 3] of the packed latent: 0, row, column. Made at each call, so that a fake x gives fake ids."""
        rows = math.isqrt(self.latent_shape[0])
        grid = torch.arange(rows, device=x.device, dtype=torch.float32)
        row, column = torch.meshgrid(grid, grid, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
