"""The interface of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sqdf_fast.schedule import DenoisingSchedule

_PROMPTS_AT_ONCE = 32
"""Prompts that the text encoders see together: 512 tokens each take a large T5 about 20 MB in bfloat16."""


@dataclass(frozen=True)
class Conditioning:
    """The network's inputs beside latents and timesteps, a row a sample: named tensors, each [B, ...]."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def expand(self, rows: int) -> Conditioning:
        """A single row repeated, [rows, ...], without a copy."""
        return Conditioning({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """A copy on ``device``."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack along the batch."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Defaults:
    """How a family is sampled by default.

    Attributes:
        guidance_scale: classifier-free guidance; 1 runs the conditional branch only.
        eta: noise level of the sampler, see DenoisingSchedule.from_scheduler.
    """

    num_inference_steps: int
    guidance_scale: float
    eta: float


class Family(ABC):
    """One text-to-image model. Every weight is frozen; adapters are the backbone's business.

    Attributes:
        network: the denoising network (UNet or transformer), a diffusers model with peft support.
        vae: the latent autoencoder.
        text_encoders: what `encode_prompts` runs; empty after `release_text_encoders` and when built from configs.
        scheduler: a diffusers scheduler that :class:`sqdf_fast.schedule.DenoisingSchedule` understands.
        latent_shape: shape of one sample in the network's own layout, e.g. (4, 64, 64).
        device, dtype: of the frozen weights.

    Class attributes:
        defaults: how it is sampled by default.
        guided: whether classifier-free guidance applies; a guidance-distilled network runs with scale 1.
        lora_targets: suffixes of the layers that get a policy LoRA by default.
        checkpointed_block_types: per part, "network" and "decoder", classes of the blocks for gradient checkpointing.
    """

    name: ClassVar[str]
    guided: ClassVar[bool] = True
    defaults: ClassVar[Defaults]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    checkpointed_block_types: ClassVar[dict[str, frozenset[str]]]
    network: Any
    vae: Any
    text_encoders: list[nn.Module]
    scheduler: Any
    latent_shape: tuple[int, ...]

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        # Not read off the weights: they may be elsewhere for a while, or quantized.
        self.device, self.dtype = torch.device(device), dtype
        self._encoded: dict[str, Conditioning] = {}

    @classmethod
    @abstractmethod
    def from_configs(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Family:
        """The architecture that a pipeline folder's config files describe, with random weights and no text encoder.

        Args:
            folder: model_index.json and a config.json for each of network, VAE and scheduler; no weights are read.
            device: "meta" allocates nothing.
        """

    @property
    def precision(self) -> torch.dtype:
        """Of latents, trained weights and schedule tables: float32, or float64 for a float64 network."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def schedule(self, num_inference_steps: int, eta: float) -> DenoisingSchedule:
        """The coefficients of the family's sampler. Raises UserError for impossible settings."""
        return DenoisingSchedule.from_scheduler(self.scheduler, num_inference_steps, eta)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, [B, ...]. Each distinct prompt is encoded once and kept."""
        missing = sorted(set(prompts) - self._encoded.keys())
        for start in range(0, len(missing), _PROMPTS_AT_ONCE):
            part = missing[start : start + _PROMPTS_AT_ONCE]
            # Kept on the CPU: thousands of prompts would take gigabytes of a card.
            encoded = self.encode_prompts(part).to("cpu")
            self._encoded.update({prompt: encoded[i : i + 1] for i, prompt in enumerate(part)})
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts]).to(self.device)

    def encode_all(self, prompts: Sequence[str]) -> None:
        """Encode the prompts and keep them, a few at a time, so that the text encoders are no longer needed."""
        for start in range(0, len(prompts), 8):
            self.encode(prompts[start : start + 8])

    def unconditional(self, guidance_scale: float) -> Conditioning | None:
        """The empty prompt's conditioning, one row; None at a guidance scale of 1, which runs the conditional half."""
        return None if guidance_scale == 1 else self.encode([""])

    def remember(self, prompt: str, conditioning: Conditioning) -> None:
        """Use ``conditioning``, one row, for ``prompt`` from now on, in place of the text encoders'."""
        self._encoded[prompt] = conditioning

    def release_text_encoders(self) -> None:
        """Free the text encoders; prompts encoded so far stay, others are refused."""
        self.text_encoders.clear()

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders; no gradient. '' is the unconditional prompt.

        Raises UserError once the text encoders are released.
        """

    @abstractmethod
    def example_conditioning(self, batch: int) -> Conditioning:
        """Zeros in the shapes and dtypes of `encode`, [batch, ...] on ``device``: what a simulation needs."""

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output m [B, ...] of ``network``, without guidance.

        Args:
            network: this family's, or a copy of it; x: latents [B, ...]; timesteps: [B]; conditioning: B rows.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent_shape] to images [B, 3, H, W] in [0, 1], differentiable, float32 or float64.

        Values outside [0, 1] are clipped, their gradient passes (a hard clamp would silence saturated pixels).
        """

    @abstractmethod
    def load_lora(self, source: str, adapter_name: str) -> None:
        """Attach published LoRA weights (folder, file or hub id) to the network. Raises UserError if they don't fit."""

    @abstractmethod
    def save_lora(self, folder: Path, adapter_name: str) -> None:
        """Write ``folder/pytorch_lora_weights.safetensors``, loadable by the diffusers pipeline's load_lora_weights."""

    @abstractmethod
    def default_consistency_lora(self) -> str | None:
        """Folder or hub id of the family's consistency LoRA; None where nobody published one."""
