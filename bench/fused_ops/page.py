"""Recorded results as Markdown: what stands between two marks of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_ops.machine import last_level
from fused_ops.summary import Row, by_op, duration, noise

MARKS = ("<!-- results: written by bench/plots.py -->", "<!-- end of results -->")

_COLUMNS = (
    *("size", "noise", "direction", "eager", "torch.compile", "ours", "x eager", "x compile", "GB/s", "of copy"),
    "peak: eager / compile / ours",
)


def results_section(results: dict[str, dict[str, Any]], pictures: dict[str, list[Path]]) -> str:
    """Everything between the marks, marks included: machine, targets, pictures and tables, a device at a time."""
    parts = [MARKS[0]]
    for name, result in results.items():
        parts += [_machine(result), _targets(result)]
        parts += [f"![{path.stem.replace('_', ' ')}](images/{path.name})" for path in pictures[name]]
        parts += _tables(result["rows"])
    if all(result["device"] != "cuda" for result in results.values()):
        parts.append("No result of a GPU has been recorded yet.")
    return "\n\n".join([*parts, MARKS[1]])


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if result["device"] == "cuda":
        title = machine["gpu"]
        about = f"{machine['gpu_memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']}, "
    else:
        title = f"{machine['cpu']}, {machine['cores']} cores"
        sizes = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
        about = f"{machine['torch_threads']} threads, native library: {machine['native']}, caches of a core: {sizes}, "
    versions = f"torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}"
    commit = f"{result['commit']['id'][:12]}{' with changes' if result['commit']['dirty'] else ''}"
    return f"### {title}\n\n{about}{versions}, commit {commit}, {result['datetime'][:10]}."


def _targets(result: dict[str, Any]) -> str:
    """The verdicts, and under them what they are worth: how busy the machine was, how far beyond its cache they are."""
    busy = [noise(result["rows"])] if result["rows"] else []  # a file of other benchmarks has none of ours
    lines = [*(target["text"] for target in result["targets"]), *busy, *_beyond_cache(result)]
    return "\n".join(f"- {line}" for line in lines)


def _beyond_cache(result: dict[str, Any]) -> list[str]:
    """How far beyond the machine's cache the largest size is; nothing for a device whose caches are not recorded."""
    last = last_level(result["machine"]["caches"]) if result["device"] == "cpu" else None
    moved = [row["bytes_moved"] for row in result["rows"] if row["size"] == "beyond-cache"]
    if last is None or not moved:
        return []
    name, size = last
    return [
        f"beyond-cache moves up to {max(moved) / 1e6:.0f} MB a call, {max(moved) / size:.1f} times the last-level "
        f"cache that this machine reports ({name}, {size / 1e6:.0f} MB; a virtual machine may report its whole host's)"
    ]


def _tables(rows: list[Row]) -> list[str]:
    parts = []
    for (op, _), group in by_op(rows).items():
        for dtype in dict.fromkeys(row["dtype"] for row in group):
            own: dict[tuple[str, ...], dict[str, Row]] = {}
            for row in group:
                if row["dtype"] == dtype:
                    own.setdefault((row["size"], row["noise"], row["direction"]), {})[row["implementation"]] = row
            lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|" + "--:|" * (len(_COLUMNS) - 3)]
            lines += [_line(key, found) for key, found in own.items()]
            parts += [f"**{op}**, {dtype}", "\n".join(lines)]
    return parts


def _line(key: tuple[str, ...], found: dict[str, Row]) -> str:
    ours = next((row for name, row in found.items() if name not in ("eager", "compile")), None)
    three = [found.get("eager"), found.get("compile"), ours]
    times = ["-" if row is None else duration(row["median_seconds"]) for row in three]
    peaks = " / ".join("-" if row is None else f"{row['peak_bytes'] / 2**20:.1f}" for row in three)
    figures = [
        _figure(ours, name, form)
        for name, form in {
            "times_eager": "{:.2f}",
            "times_compile": "{:.2f}",
            "gb_per_second": "{:.1f}",
            "copy_fraction": "{:.0%}",
        }.items()
    ]
    size, noise, direction = key
    return f"| {' | '.join([size, noise or '-', direction, *times, *figures, f'{peaks} MiB'])} |"


def _figure(row: Row | None, name: str, form: str) -> str:
    return "-" if row is None or row[name] is None else form.format(row[name])
