"""Judges and metrics of pictures that are already sampled."""

from __future__ import annotations

from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.judge import Judge, Measurement, PictureJudge, Pictures, PromptJudge, Values
from sqdf_fast.evaluate.judges import Judges, available_judges, load_judges
from sqdf_fast.evaluate.metrics import evaluate_images

__all__ = [
    "Judge",
    "Judges",
    "Measurement",
    "PictureJudge",
    "Pictures",
    "PromptJudge",
    "Values",
    "available_judges",
    "bootstrap_interval",
    "evaluate_images",
    "load_judges",
]
