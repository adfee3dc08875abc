"""What differs per model family: prompt encoding, the network call, latent decode, scheduler, LoRA format."""

from __future__ import annotations

from sqdf_fast.families.family import Conditioning, Family
from sqdf_fast.families.loading import load_family

__all__ = ["Conditioning", "Family", "load_family"]
