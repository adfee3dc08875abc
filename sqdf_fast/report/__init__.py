"""What people look at: progress, metrics, sheets of samples, one page a run."""

from __future__ import annotations

from sqdf_fast.report.environment import environment, write_environment
from sqdf_fast.report.grid import before_after_grid, image_grid, save_png
from sqdf_fast.report.html import write_report
from sqdf_fast.report.metrics import MetricsLog, read_metrics
from sqdf_fast.report.progress import TrainingProgress
from sqdf_fast.report.run import read_run, summarise, summary_lines
from sqdf_fast.report.samples import read_samples, save_samples
from sqdf_fast.report.stages import StageProgress

__all__ = [
    "MetricsLog",
    "StageProgress",
    "TrainingProgress",
    "before_after_grid",
    "environment",
    "image_grid",
    "read_metrics",
    "read_run",
    "read_samples",
    "save_png",
    "save_samples",
    "summarise",
    "summary_lines",
    "write_environment",
    "write_report",
]
