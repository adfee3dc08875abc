"""What people look at: plots, pages, tables, progress and image grids. It knows nothing of a run."""

from __future__ import annotations

from sqdf_fast.display.grid import before_after_grid, image_grid, save_png
from sqdf_fast.display.progress import TrainingProgress
from sqdf_fast.display.stages import StageProgress

__all__ = ["StageProgress", "TrainingProgress", "before_after_grid", "image_grid", "save_png"]
