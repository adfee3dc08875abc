"""Fast reward fine-tuning of diffusion models with Soft Q-based Diffusion Finetuning (SQDF)."""

from __future__ import annotations

__version__ = "0.1.0"
