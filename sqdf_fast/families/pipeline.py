"""What the families share with diffusers' pipelines: their parts, LoRA files, KL decoders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import diffusers
import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from sqdf_fast.errors import UserError, first_line
from sqdf_fast.families.family import Family
from sqdf_fast.families.text import CLIP_TOKENS
from sqdf_fast.rewards.preprocess import saturate

if TYPE_CHECKING:
    from typing_extensions import Self


class PipelineFamily(Family):
    """A family that one class of diffusers pipelines describes.

    Args:
        pipeline: as loaded by diffusers, weights already in the wanted dtype, network and VAE on the wanted device; its
            VAE loses the encoder.
        resolution: side of the square images in pixels; default: what the network was trained for.
        consistency_lora: folder or hub id of its consistency LoRA; default: the published one, if it fits.

    Raises:
        UserError: the resolution is no multiple of the latent's patches.

    Class attributes:
        pipeline_class: the class that loads and saves its folders and LoRA files.
        network_part: the pipeline's name of the network.
        patch: latent positions a side that the network reads as one.
        make_scheduler: from the pipeline's scheduler to the one that runs in its place, over the same noise levels.
        published_consistency_lora: hub id, and the width of the text states of the networks that it fits.

    Attributes:
        resolution: side of the images in pixels; pixels_per_latent: pixels of a latent position's side.
        clip_tokens: length of a prompt for its CLIP text encoders.
    """

    pipeline_class: ClassVar[Any]
    network_part: ClassVar[Literal["unet", "transformer"]]
    patch: ClassVar[int] = 1
    make_scheduler: ClassVar[Callable[[Any], Any]]
    published_consistency_lora: ClassVar[tuple[str, int] | None] = None
    checkpointed_block_types: ClassVar[dict[str, frozenset[str]]] = {
        "network": frozenset({"ResnetBlock2D", "BasicTransformerBlock"}),
        "decoder": frozenset({"ResnetBlock2D", "Upsample2D", "Attention", "AutoencoderTinyBlock"}),
    }

    def __init__(self, pipeline: Any, resolution: int | None = None, consistency_lora: str | None = None) -> None:
        self.network = getattr(pipeline, self.network_part)
        super().__init__(self.network.device, self.network.dtype)
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
        """With random weights and no text encoder; ``options`` are the class's own."""
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
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor
        if config.shift_factor:
            latents = latents + config.shift_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        # Rewards are users' code and need not handle half precision.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return saturate(images / 2 + 0.5)

    def load_lora(self, source: str, adapter_name: str) -> None:
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
        layers = get_peft_model_state_dict(self.network, adapter_name=adapter_name)
        metadata, part = self.network.peft_config[adapter_name].to_dict(), self.network_part
        self.pipeline_class.save_lora_weights(
            folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        )

    def default_consistency_lora(self) -> str | None:
        published, width = self.published_consistency_lora or (None, 0)
        fits = published and self.network.config.cross_attention_dim == width
        return self._consistency_lora or (published if fits else None)


def cast(module: Any, dtype: torch.dtype) -> Any:
    """``module`` in another dtype, without diffusers' warning that it may have been loaded in that dtype at once."""
    return nn.Module.to(module, dtype=dtype)


def _from_config(path: Path) -> Any:
    config = json.loads(path.read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)
