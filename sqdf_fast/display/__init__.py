"""What people look at: plots, pages, tables, progress and image grids. It knows nothing of a run."""

from __future__ import annotations

from sqdf_fast.display.grid import before_after_grid, image_grid, save_png, table_grid
from sqdf_fast.display.progress import StageProgress, TrainingProgress
from sqdf_fast.display.tables import text_table
from sqdf_fast.display.units import format_bytes, format_duration

__all__ = [
    "StageProgress",
    "TrainingProgress",
    "before_after_grid",
    "format_bytes",
    "format_duration",
    "image_grid",
    "save_png",
    "table_grid",
    "text_table",
]
