"""Plots, pages, tables, progress and image grids, independent of runs."""

from __future__ import annotations

from sqdf_fast.display.grid import image_grid, save_png
from sqdf_fast.display.progress import StageProgress, TrainingProgress
from sqdf_fast.display.tables import text_table
from sqdf_fast.display.units import format_bytes, format_duration

__all__ = [
    "StageProgress",
    "TrainingProgress",
    "format_bytes",
    "format_duration",
    "image_grid",
    "save_png",
    "text_table",
]
