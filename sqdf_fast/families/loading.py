"""From a model's name to a family: with its weights, or from its configuration alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sqdf_fast import shapes
from sqdf_fast.errors import UserError, first_line
from sqdf_fast.families.family import Family

Quantization = Literal["none", "nf4", "int8"]
Attention = Literal["auto", "native", "xformers"]

_CONFIGS = Path(__file__).parent / "configs"

KNOWN_MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
}
"""Short names of the models whose configurations ship with the package, and their hub ids."""

_OTHER_IDS = {"runwayml/stable-diffusion-v1-5": "sd15"}

# Module and class per pipeline: a family is imported when it is asked for, each takes a second or two.
_FAMILIES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
}

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def refuse_unknown_model(model: str) -> None:
    """Raises UserError for what is neither a known name nor a folder that exists nor of a hub id's form."""
    hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not (model == "shapes" or model in KNOWN_MODELS or hub_id or os.path.exists(model)):
        raise UserError(
            f"model {model!r} is unknown; allowed: 'shapes', {', '.join(map(repr, KNOWN_MODELS))}, "
            "an existing diffusers folder, or a hub id owner/name"
        )


def load_family(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    resolution: int | None = None,
    quantization: Quantization = "none",
) -> Family:
    """Load ``model``: 'shapes', a name in KNOWN_MODELS, a diffusers folder, or a hub id.

    Args:
        device, dtype: of the frozen weights of network and VAE; text encoders run on the device if they fit.
        resolution: side of the square images in pixels; default: what the network was trained for.
        quantization: of the network's linear layers, by bitsandbytes; needs a CUDA device.

    Raises:
        UserError: no such model, a damaged file, a pipeline of another family, or an impossible quantization or
            resolution.
    """
    refuse_unknown_model(model)
    source = str(shapes.pipeline_folder()) if model == "shapes" else KNOWN_MODELS.get(model, model)
    # The index is one small file: a pipeline of another family is refused before its gigabytes are fetched.
    index = _index(model, source)
    family = _family_class(model, index)
    quantized = _quantization_config(quantization, family.network_part, device, dtype)
    try:
        with _without_loading_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                source, dtype=dtype, **quantized, **family.loading_options(index)
            )
            # Text encoders stay on the CPU until they run.
            getattr(pipeline, family.network_part).to(device)
            pipeline.vae.to(device)
    except (*_UNREADABLE, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model {model!r} cannot be loaded ({first_line(error)}); check the folder or id, and the network"
        ) from None
    return family(pipeline, resolution=resolution, **_own_options(model))


def known_model(name: str) -> Path | None:
    """Folder of the shipped configurations of ``name``, a short name or hub id in KNOWN_MODELS, or 'shapes'.

    None: the package does not know that model.
    """
    if name == "shapes":
        return shapes.pipeline_folder()
    short = {hub_id: short for short, hub_id in KNOWN_MODELS.items()} | _OTHER_IDS
    folder = _CONFIGS / short.get(name, name)
    return folder if folder.parent == _CONFIGS and (folder / "model_index.json").is_file() else None


def family_from_configs(
    model: str, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
) -> Family:
    """The family of ``model`` with random weights and no text encoder: what a simulation needs. Nothing is fetched.

    Args:
        model: a name that `known_model` knows, or a diffusers folder, of which only the configurations are read.
        device: "meta" allocates nothing.

    Raises:
        UserError: no such model here, or unreadable configurations.
    """
    folder = known_model(model) or Path(model)
    if not folder.is_dir():
        raise UserError(
            f"the architecture of model {model!r} is not known here; allowed: 'shapes', "
            f"{', '.join(map(repr, KNOWN_MODELS))}, their hub ids, or a diffusers folder"
        )
    family = _family_class(model, _index(model, str(folder)))
    try:
        return family.from_configs(folder, dtype=dtype, device=device, resolution=resolution, **_own_options(model))
    except _UNREADABLE as error:
        raise UserError(f"model {model!r} has a configuration that cannot be read ({first_line(error)})") from None


def set_attention(family: Family, attention: Attention, device: torch.device) -> None:
    """Choose the attention implementation of the network.

    Args:
        attention: "auto": diffusers' default. "native": torch's scaled_dot_product_attention. "xformers".
        device: where the network will run, wherever its weights are now.

    Raises:
        UserError: xformers is not installed, or does not run on the device.
    """
    if attention == "auto":
        return
    try:
        if attention == "xformers" and device.type != "cuda":
            raise RuntimeError(f"xformers runs on CUDA devices, this one is {device}")
        family.network.set_attention_backend(attention)
        if attention == "xformers":
            # The processors of UNets and Stable Diffusion 3 know no backends; they have a switch of their own.
            for module in family.network.modules():
                if isinstance(module, AttentionLayer) and not hasattr(module.processor, "_attention_backend"):
                    module.set_use_memory_efficient_attention_xformers(True)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"execution.attention = {attention!r} cannot be used here ({first_line(error)}); use auto"
        ) from None


def _quantization_config(
    quantization: Quantization, part: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    if quantization == "none":
        return {}
    given = f"execution.quantization = {quantization!r}"
    if device.type != "cuda":
        raise UserError(f"{given} needs a CUDA device, this one is {device}; use none")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    try:
        config = BitsAndBytesConfig(**nf4 if quantization == "nf4" else {"load_in_8bit": True})
        return {"quantization_config": PipelineQuantizationConfig(quant_mapping={part: config})}
    except ImportError as error:
        raise UserError(
            f"{given} needs bitsandbytes ({first_line(error)}); pip install bitsandbytes, or use none"
        ) from None


def _own_options(model: str) -> dict[str, str]:
    return {"consistency_lora": str(shapes.consistency_lora_folder())} if model == "shapes" else {}


def _index(model: str, source: str) -> dict[str, Any]:
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(source)
        index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {model!r} has no readable model_index.json ({first_line(error)}); give a diffusers folder"
        ) from None
    return index


def _family_class(model: str, index: dict[str, Any]) -> Any:
    kind = index["_class_name"]
    if kind not in _FAMILIES:
        raise UserError(f"model {model!r} is a {kind}; allowed: {', '.join(_FAMILIES)}")
    module, name = _FAMILIES[kind]
    return getattr(import_module(f"sqdf_fast.families.{module}"), name)


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    # Users need no bar for each part of a pipeline; those of a download stay.
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
