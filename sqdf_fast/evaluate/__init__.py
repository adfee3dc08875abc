"""Judges and metrics of images that are already sampled."""

from __future__ import annotations

from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.judge import ImageJudge, ImageSet, Judge, Measurement, PromptJudge, Values
from sqdf_fast.evaluate.judges import Judges, available_judges, load_judges
from sqdf_fast.evaluate.metrics import evaluate_images

# Names from before version 0.2, of which judges in users' own modules are subclasses.
PictureJudge, Pictures = ImageJudge, ImageSet

__all__ = [
    "ImageJudge",
    "ImageSet",
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
