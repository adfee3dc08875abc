"""The files of a run, written and read back: folder, checkpoints, metrics, samples, its page."""

from __future__ import annotations

from sqdf_fast.runs.environment import environment, write_environment
from sqdf_fast.runs.metrics import MetricsLog, read_metrics
from sqdf_fast.runs.page import write_report
from sqdf_fast.runs.run import Summary, read_run, summary_lines
from sqdf_fast.runs.samples import read_samples, save_samples

__all__ = [
    "MetricsLog",
    "Summary",
    "environment",
    "read_metrics",
    "read_run",
    "read_samples",
    "save_samples",
    "summary_lines",
    "write_environment",
    "write_report",
]
