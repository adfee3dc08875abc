"""Judges and metrics of pictures that are already sampled."""

from __future__ import annotations

from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.judges import EmbeddingJudges, Judges, ShapesJudges, load_judges
from sqdf_fast.evaluate.metrics import evaluate_images

__all__ = [
    "EmbeddingJudges",
    "Judges",
    "ShapesJudges",
    "bootstrap_interval",
    "evaluate_images",
    "load_judges",
]
