"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a rectified-flow transformer over two CLIPs and an optional T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from sqdf_fast.families.family import Conditioning, Defaults
from sqdf_fast.families.flow import FlowFamily, shift
from sqdf_fast.families.text import on_device, penultimate, token_ids
from sqdf_fast.schedule import DenoisingSchedule

_T5_TOKENS = 256
_BLOCKS = frozenset({"JointTransformerBlock"})
_CLIPS = 2


class StableDiffusion3(FlowFamily):
    """A StableDiffusion3Pipeline. Without its T5 encoder, the T5 states are zeros, as in the pipeline.

    Args:
        pipeline, resolution: see Family.
    """

    name = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    # Steps and guidance: the model card of 3.5-medium; noise level: Flow-GRPO's experiments with it.
    defaults = Defaults(num_inference_steps=40, guidance_scale=4.5, eta=0.7)
    checkpointed_block_types = FlowFamily.checkpointed_block_types | {"network": _BLOCKS}

    def __init__(self, pipeline: StableDiffusion3Pipeline, resolution: int | None = None) -> None:
        super().__init__(pipeline, resolution)
        _crop_positions(self.network, self.latent_shape[-1])

    @classmethod
    def loading_options(cls, index: dict[str, Any]) -> dict[str, Any]:
        # A folder may lack its 9 GB of T5.
        return {part: None for part in ("text_encoder_3", "tokenizer_3") if not any(index.get(part) or ())}

    def schedule(self, num_inference_steps: int, eta: float) -> DenoisingSchedule:
        tokens = (self.latent_shape[-1] // self.patch) ** 2
        mu = shift(self.scheduler, tokens)
        return DenoisingSchedule.from_scheduler(self.scheduler, num_inference_steps, eta, **mu)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        encoders = self.encoders(prompts)
        states, pooled = [], []
        for encoder, tokenizer in zip(encoders[:_CLIPS], self.tokenizers, strict=False):
            with on_device(encoder, self.device):
                hidden, projected = penultimate(encoder, token_ids(tokenizer, prompts, self.clip_tokens, encoder))
            states.append(hidden.to(self.device, self.dtype))
            pooled.append(projected.to(self.device, self.dtype))
        clip = torch.cat(states, dim=-1)
        width = self.network.config.joint_attention_dim
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        long = self.zeros(len(prompts), _T5_TOKENS, width)
        for encoder, tokenizer in zip(encoders[_CLIPS:], self.tokenizers[_CLIPS:], strict=True):
            with on_device(encoder, self.device):
                long = encoder(token_ids(tokenizer, prompts, _T5_TOKENS, encoder))[0].to(self.device, self.dtype)
        return Conditioning(
            {
                "encoder_hidden_states": torch.cat([clip, long], dim=1),
                "pooled_projections": torch.cat(pooled, dim=-1),
            }
        )

    def example_conditioning(self, batch: int) -> Conditioning:
        config = self.network.config
        return Conditioning(
            {
                "encoder_hidden_states": self.zeros(batch, self.clip_tokens + _T5_TOKENS, config.joint_attention_dim),
                "pooled_projections": self.zeros(batch, config.pooled_projection_dim),
            }
        )

    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return network(x, timestep=timesteps, return_dict=False, **conditioning.tensors)[0]


def _crop_positions(network: Any, side: int) -> None:
    """Keep the position embeddings of one resolution: 3.5-medium's table takes 432 MiB in bfloat16, its center 12."""
    embedding = network.pos_embed
    kept = side // network.config.patch_size
    if embedding.pos_embed_max_size and kept < embedding.pos_embed_max_size:
        embedding.pos_embed = embedding.cropped_pos_embed(side, side).clone()
        embedding.pos_embed_max_size = kept
        # A saved copy then describes itself.
        network.register_to_config(pos_embed_max_size=kept)
