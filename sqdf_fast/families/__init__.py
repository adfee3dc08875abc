"""What differs per model family: prompt encoding, the network call, latent decode, scheduler, LoRA format."""

from __future__ import annotations

from sqdf_fast.families.family import Conditioning, Defaults, Family
from sqdf_fast.families.loading import (
    KNOWN_MODELS,
    family_from_configs,
    known_model,
    load_family,
    refuse_unknown_model,
    set_attention,
)

__all__ = [
    "KNOWN_MODELS",
    "Conditioning",
    "Defaults",
    "Family",
    "family_from_configs",
    "known_model",
    "load_family",
    "refuse_unknown_model",
    "set_attention",
]
