"""Folders of the larger families, small enough for a test: every part of a real one, random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from support.tiny import WORDS, _tokenizer, write_pipeline

T5_WIDTH = 32


def write_sdxl(folder: Path) -> Path:
    """8x8 latents of 4 channels, 16x16 images."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip(16)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(24, 12)),
        tokenizer=_tokenizer(folder.parent / "vocabulary"),
        tokenizer_2=_tokenizer(folder.parent / "vocabulary"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


def write_sd3(folder: Path) -> Path:
    """8x8 latents of 4 channels, 16x16 images; T5 included."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 10,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_clip(16, 12)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(8, 10)),
        text_encoder_3=_t5(),
        tokenizer=_tokenizer(folder.parent / "vocabulary"),
        tokenizer_2=_tokenizer(folder.parent / "vocabulary"),
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def write_flux(folder: Path) -> Path:
    """Packed latents of 16 channels, 2 pixels a latent position."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(_clip(16)),
        text_encoder_2=_t5(),
        tokenizer=_tokenizer(folder.parent / "vocabulary"),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "stable-diffusion": write_pipeline,
    "stable-diffusion-xl": write_sdxl,
    "stable-diffusion-3": write_sd3,
    "flux": write_flux,
}


def _vae(**settings: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        **settings,
    )


def _clip(width: int, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 * len(WORDS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=projection,
        bos_token_id=2 * len(WORDS),
        eos_token_id=2 * len(WORDS) + 1,
        pad_token_id=2 * len(WORDS) + 1,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in WORDS)]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=512)
