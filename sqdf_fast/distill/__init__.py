"""Consistency distillation: a LoRA with which one network call foresees where a guided trajectory ends."""

from __future__ import annotations

from sqdf_fast.distill.accuracy import Accuracy, accuracy_table, measure_accuracy
from sqdf_fast.distill.distiller import distill
from sqdf_fast.distill.settings import DISTILLATION_PRESETS, Distillation, make_distillation

__all__ = [
    "DISTILLATION_PRESETS",
    "Accuracy",
    "Distillation",
    "accuracy_table",
    "distill",
    "make_distillation",
    "measure_accuracy",
]
