"""The interface of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about each sample: named tensors, each [B, ...]."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """A copy on ``device``."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack along the batch."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Family(ABC):
    """One loaded text-to-image model. Every weight is frozen; adapters are the backbone's business.

    Attributes:
        network: the denoising network (UNet or transformer), a diffusers model with peft support.
        scheduler: a diffusers scheduler that :class:`sqdf_fast.schedule.DenoisingSchedule` understands.
        latent_shape: shape of one sample in the network's own layout, e.g. (4, 64, 64).
        device, dtype: of the frozen weights.
    """

    name: ClassVar[str]
    network: Any
    scheduler: Any
    latent_shape: tuple[int, ...]

    def __init__(self) -> None:
        self._encoded: dict[str, Conditioning] = {}

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.network.parameters()).dtype
        return dtype

    @property
    def precision(self) -> torch.dtype:
        """Of latents, trained weights and schedule tables: float32, or float64 for a float64 network."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, [B, ...]. Each distinct prompt is encoded once and kept."""
        missing = sorted(set(prompts) - self._encoded.keys())
        if missing:
            # Kept on the CPU: thousands of prompts would take gigabytes of a card.
            encoded = self.encode_prompts(missing).to("cpu")
            self._encoded.update({prompt: encoded[i : i + 1] for i, prompt in enumerate(missing)})
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts]).to(self.device)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders; no gradient. '' is the unconditional prompt."""

    @abstractmethod
    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Network output m [B, ...] at latents x [B, ...] and timesteps [B], without guidance."""

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
