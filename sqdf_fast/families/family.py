"""A model family: what differs between pipelines is a subclass; their parts, LoRA files and KL decoders are alike."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import diffusers
import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from sqdf_fast.errors import UserError, first_line
from sqdf_fast.families.text import CLIP_TOKENS
from sqdf_fast.rewards.preprocess import saturate
from sqdf_fast.schedule import DenoisingSchedule

if TYPE_CHECKING:
    from typing_extensions import Self

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
    """One text-to-image model, as a class of diffusers pipelines describes it.

    Every weight is frozen; adapters are the backbone's business.

    Args:
        pipeline: as loaded by diffusers, weights already in the wanted dtype, network and VAE on the wanted device; its
            VAE loses the encoder.
        resolution: side of the square images in pixels; default: what the network was trained for.
        consistency_lora: folder or hub id of its consistency LoRA; default: the published one, if it fits.

    Raises:
        UserError: a resolution that is not a multiple of the latent's patches.

    Class attributes:
        pipeline_class: the class that loads and saves its folders and LoRA files.
        network_part: the pipeline's name of the network.
        patch: latent positions a side that the network reads as one.
        make_scheduler: from the pipeline's scheduler to the one that runs in its place, over the same noise levels.
        published_consistency_lora: hub id, and the width of the text states of the networks that it fits.
        defaults: how it is sampled by default.
        guided: whether classifier-free guidance applies; a guidance-distilled network runs with scale 1.
        lora_targets: suffixes of the layers that get a policy LoRA by default.
        checkpointed_block_types: per part, "network" and "decoder", classes of the blocks for gradient checkpointing.

    Attributes:
        network: the denoising network (UNet or transformer), a diffusers model with peft support.
        vae: the latent autoencoder.
        text_encoders: what `encode_prompts` runs; empty after `release_text_encoders` and when built from configs.
        scheduler: a diffusers scheduler that :class:`sqdf_fast.schedule.DenoisingSchedule` understands.
        latent_shape: shape of one sample in the network's own layout, e.g. (4, 64, 64).
        device, dtype: of the frozen weights, wherever and however they are stored for a while.
        resolution: side of the images in pixels; pixels_per_latent: pixels of a latent position's side.
        clip_tokens: length of a prompt for its CLIP text encoders.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[Any]
    network_part: ClassVar[Literal["unet", "transformer"]]
    patch: ClassVar[int] = 1
    make_scheduler: ClassVar[Any]
    published_consistency_lora: ClassVar[tuple[str, int] | None] = None
    defaults: ClassVar[Defaults]
    guided: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    checkpointed_block_types: ClassVar[dict[str, frozenset[str]]] = {
        "network": frozenset({"ResnetBlock2D", "BasicTransformerBlock"}),
        "decoder": frozenset({"ResnetBlock2D", "Upsample2D", "Attention", "AutoencoderTinyBlock"}),
    }
    latent_shape: tuple[int, ...]

    def __init__(self, pipeline: Any, resolution: int | None = None, consistency_lora: str | None = None) -> None:
        self.network = getattr(pipeline, self.network_part)
        self.device, self.dtype = torch.device(self.network.device), self.network.dtype
        self._encoded: dict[str, Conditioning] = {}
        self.vae = pipeline.vae
        self._consistency_lora = consistency_lora
        self.text_encoders, self.tokenizers = (
            [part for end in ("", "_2", "_3") if (part := pipeline.components.get(kind + end)) is not None]
            for kind in ("text_encoder", "tokenizer")
        )
        for module in (self.network, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        # Latents are never made from images here.
        self.vae.encoder = self.vae.quant_conv = None
        self.clip_tokens = self.tokenizers[0].model_max_length if self.tokenizers else CLIP_TOKENS
        self.scheduler = self.make_scheduler(pipeline.scheduler)
        self.pixels_per_latent = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = resolution or self.trained_latent_side() * self.pixels_per_latent
        grain = self.pixels_per_latent * self.patch
        if self.resolution % grain:
            raise UserError(f"resolution = {self.resolution} pixels; this model needs a multiple of {grain}")
        self.latent_shape = self.latent_layout(self.resolution // self.pixels_per_latent)

    @classmethod
    def from_configs(
        cls, folder: Path, *, dtype: torch.dtype, device: torch.device, resolution: int | None = None, **options: Any
    ) -> Self:
        """The architecture that a pipeline folder's config files describe, with random weights and no text encoder.

        Args:
            folder: model_index.json and a config.json for each of network, VAE and scheduler; no weights are read.
            device: "meta" allocates nothing.
            options: keywords of the constructor.
        """
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        signature = inspect.signature(cls.pipeline_class).parameters
        parts: dict[str, Any] = {name: None for name, kind in signature.items() if kind.default is kind.empty}
        parts |= {name: value for name, value in index.items() if name in signature and not isinstance(value, list)}
        with torch.device(device):
            for name in (cls.network_part, "vae"):
                parts[name] = cast(_from_config(folder / name / "config.json"), dtype)
        parts["scheduler"] = _from_config(folder / "scheduler" / "scheduler_config.json")
        family = cls(cls.pipeline_class(**parts), resolution=resolution, **options)
        tokenizer = folder / "tokenizer" / "tokenizer_config.json"
        if tokenizer.is_file():
            # Known models ship without one: theirs is CLIP's.
            family.clip_tokens = json.loads(tokenizer.read_text(encoding="utf-8"))["model_max_length"]
        return family

    @classmethod
    def loading_options(cls, index: dict[str, Any]) -> dict[str, Any]:
        """Keywords of from_pretrained for a folder with this model_index.json."""
        return {}

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

    def lora_options(self) -> dict[str, Any]:
        """Keywords of the pipeline's ``lora_state_dict``."""
        return {}

    def trained_latent_side(self) -> int:
        """Height and width of the latents that the network was trained on."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise UserError(f"this network was trained on {height} x {width} latents; only square images are supported")
        return int(height)

    def latent_layout(self, side: int) -> tuple[int, ...]:
        """The network's own shape of one sample whose latent has ``side`` rows and columns."""
        return (self.network.config.in_channels, side, side)

    def encoders(self, prompts: Sequence[str]) -> list[Any]:
        """The text encoders, in the pipeline's order. Raises UserError once they are released."""
        if not self.text_encoders:
            raise UserError(
                f"prompt {prompts[0]!r} is new, and the text encoders are not loaded; "
                "encode every prompt before they are released"
            )
        return self.text_encoders

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the family's device in its dtype."""
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent_shape] to images [B, 3, H, W] in [0, 1], differentiable, float32 or float64.

        Values outside [0, 1] are clipped, their gradient passes (a hard clamp would silence saturated pixels).
        """
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor
        if config.shift_factor:
            latents = latents + config.shift_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        # Rewards are users' code and need not handle half precision.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return saturate(images / 2 + 0.5)

    def load_lora(self, source: str, adapter_name: str) -> None:
        """Attach published LoRA weights (folder, file or hub id) to the network. Raises UserError if they don't fit."""
        try:
            state, *alphas, metadata = self.pipeline_class.lora_state_dict(
                source, return_lora_metadata=True, **self.lora_options()
            )
            # diffusers would load nothing and say nothing.
            if not any(key.startswith(f"{self.network_part}.") for key in state):
                raise ValueError(f"it has no weights of a {self.network_part}")
            self.network.load_lora_adapter(
                dict(state),
                prefix=self.network_part,
                network_alphas=alphas[0] if alphas else None,
                adapter_name=adapter_name,
                metadata=metadata,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{adapter_name} LoRA {source!r} cannot be loaded into this model ({first_line(error)}); "
                "give the folder of a LoRA made for this base"
            ) from None

        # diffusers has rounded them to the network's dtype.
        for name, parameter in self.network.named_parameters():
            exact = state.get(f"{self.network_part}.{name.replace(f'.{adapter_name}.', '.')}")
            if exact is not None and f".{adapter_name}." in name:
                parameter.data = exact.to(parameter.device, self.precision)

    def save_lora(self, folder: Path, adapter_name: str) -> None:
        """Write ``folder/pytorch_lora_weights.safetensors``, loadable by the diffusers pipeline's load_lora_weights."""
        layers = get_peft_model_state_dict(self.network, adapter_name=adapter_name)
        metadata, part = self.network.peft_config[adapter_name].to_dict(), self.network_part
        self.pipeline_class.save_lora_weights(
            folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        )

    def default_consistency_lora(self) -> str | None:
        """Folder or hub id of the family's consistency LoRA; None without a published one."""
        published, width = self.published_consistency_lora or (None, 0)
        fits = published and self.network.config.cross_attention_dim == width
        return self._consistency_lora or (published if fits else None)


def cast(module: Any, dtype: torch.dtype) -> Any:
    """``module`` in another dtype, without diffusers' warning that it may have been loaded in that dtype at once."""
    return nn.Module.to(module, dtype=dtype)


def _from_config(path: Path) -> Any:
    config = json.loads(path.read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)
