"""From a model's name to a loaded family."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sqdf_fast import shapes
from sqdf_fast.errors import UserError
from sqdf_fast.families.family import Family
from sqdf_fast.families.stable_diffusion import StableDiffusion

SUPPORTED = ("StableDiffusionPipeline",)


def load_family(model: str, *, device: torch.device, dtype: torch.dtype) -> Family:
    """Load ``model``: 'shapes', a diffusers folder, or a hub id.

    Raises UserError when there is no such model, a file of it is damaged, or its pipeline is of no supported family.
    """
    consistency: dict[str, str] = {}
    source = model
    if model == "shapes":
        source = str(shapes.pipeline_folder())
        consistency = {"consistency_lora": str(shapes.consistency_lora_folder())}
    elif not os.path.exists(model) and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(
            f"model {model!r} is unknown; allowed: 'shapes', an existing diffusers folder, or a hub id owner/name"
        )
    _check_kind(model, source)
    try:
        with _without_loading_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                source, dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {model!r} cannot be loaded ({reason}); check the folder or id, and the network"
        ) from None
    assert isinstance(pipeline, StableDiffusionPipeline)
    return StableDiffusion(pipeline.to(device), **consistency)


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    # A bar for each part of a pipeline says nothing to a user; those of a download stay.
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _check_kind(model: str, source: str) -> None:
    # The index is one small file: a pipeline of another family is refused before its gigabytes are fetched.
    try:
        kind = DiffusionPipeline.load_config(source)["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {model!r} has no readable model_index.json ({reason}); give a diffusers folder"
        ) from None
    if kind not in SUPPORTED:
        raise UserError(f"model {model!r} is a {kind}; allowed: {', '.join(SUPPORTED)}")
