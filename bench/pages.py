"""Recorded figures of a training step, of sampling and of the 8-bit optimizer as Markdown, for their own pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_ops.page import MARKS
from fused_ops.summary import duration
from training_step import summary

Row = dict[str, Any]
Tables = Callable[[list[Row]], list[str]]


def write_pages(results: dict[str, dict[str, Any]], docs: Path) -> list[Path]:
    """Put what is recorded between the marks of every page in `docs` that has them; the pages written."""
    written = []
    for (name, op), tables in PAGES.items():
        page = docs / name
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        before, mark, rest = text.partition(MARKS[0])
        if mark:
            page.write_text(before + _section(results, op, tables) + rest.partition(MARKS[1])[2], encoding="utf-8")
            written.append(page)
    return written


def _section(results: dict[str, dict[str, Any]], op: str, tables: Tables) -> str:
    parts = [MARKS[0]]
    for result in results.values():
        rows = [row for row in result.get("others", []) if row["op"] == op]
        if rows:
            parts += [_machine(result), *tables(rows)]
    if len(parts) == 1:
        parts.append("Nothing has been recorded yet.")
    return "\n\n".join([*parts, MARKS[1]])


def _machine(result: dict[str, Any]) -> str:
    machine, commit = result["machine"], result["commit"]
    device = machine["gpu"] if result["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    changed = " with changes" if commit["dirty"] else ""
    return (
        f"**{device}**, {machine['torch_threads']} threads, torch {machine['torch']}, "
        f"commit {commit['id'][:12]}{changed}, {result['datetime'][:10]}."
    )


def _training_steps(rows: list[Row]) -> list[str]:
    parts = []
    for problem in dict.fromkeys((row["size"], row["dtype"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["size"], row["dtype"], row["batch"]) == problem]
        lines = [
            [
                row["implementation"],
                duration(row["median_seconds"]),
                f"{row['spread']:.0%}",
                _figure(row["times_published"], "{:.2f}"),
                f"{row['flops'] / 1e9:,.1f}",
                f"{row['flops_per_second'] / 1e9:,.1f}",
                _figure(row["utilisation"], "{:.0%}"),
                summary.size(row["peak_bytes"]),
                "-" if row["predicted_bytes"] is None else summary.size(row["predicted_bytes"]),
            ]
            for row in own
        ]
        head = ("way", "time", "spread", "x published", "GFLOP", "GFLOP/s", "of best", "peak", "predicted")
        parts += [f"{problem[0]}, {problem[1]}, batch {problem[2]}:", _table(head, lines)]
        verdicts = "\n".join(f"- {text}" for text, _ in summary.verdicts(own))
        parts += [verdicts] if verdicts else []
    return parts


def _sampling(rows: list[Row]) -> list[str]:
    head = ("variant", "precision", "time of two steps", "spread", "x adapter", "x merged", "operators")
    lines = [
        [
            row["implementation"],
            row["dtype"],
            duration(row["median_seconds"]),
            f"{row['spread']:.0%}",
            _figure(row["times_eager"], "{:.2f}"),
            _figure(row["times_merged"], "{:.2f}"),
            _figure(row.get("operators"), "{:,}"),
        ]
        for row in rows
    ]
    return [_table(head, lines)]


def _optimizer(rows: list[Row]) -> list[str]:
    head = ("implementation", "what", "precision", "time", "spread", "GB/s", "x PyTorch", "x bitsandbytes")
    lines = [
        [
            row["implementation"],
            row["direction"],
            row["dtype"],
            duration(row["median_seconds"]),
            f"{row['spread']:.0%}",
            f"{row['gb_per_second']:.1f}",
            _figure(row["times_eager"], "{:.2f}"),
            _figure(row["times_bitsandbytes"], "{:.2f}"),
        ]
        for row in rows
    ]
    return [_table(head, lines)]


def _table(head: tuple[str, ...], lines: list[list[str]]) -> str:
    rule = "|---|" + "--:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


PAGES: dict[tuple[str, str], Tables] = {
    ("training_step.md", "training_step"): _training_steps,
    ("sampling.md", "sampling"): _sampling,
    ("optimizers.md", "adamw_8bit"): _optimizer,
}
