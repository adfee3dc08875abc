"""Draw the recorded benchmarks and write their tables into the pages of docs/, from bench/results/ alone.

    python bench pages

Only the text between the marks of a page is replaced.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
import registry
from harness.benchmark import Row, noise
from harness.machine import last_level
from harness.tables import Section, write_between_marks
from record import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
PLOTTED = "benchmarks.md"
"""The page of the fused ops."""

Result = dict[str, Any]
"""A file of bench/results/."""


def write_pages(results: dict[str, Result], docs: Path, images: dict[str, list[Path]]) -> list[Path]:
    """Put what is recorded between the marks of every page in `docs` that has them; the pages written."""
    pages = dict.fromkeys(benchmark.page for benchmark in registry.BENCHMARKS)
    return [docs / page for page in pages if write_between_marks(docs / page, sections(page, results, images))]


def sections(page: str, results: dict[str, Result], images: dict[str, list[Path]]) -> list[Section]:
    """What is recorded for a page, a device at a time."""
    benchmarks = [benchmark for benchmark in registry.BENCHMARKS if benchmark.page == page]
    names = {benchmark.name for benchmark in benchmarks}
    found = []
    for device, result in results.items():
        rows = [row for row in result["rows"] if row["op"] in names]
        if rows:
            points = [verdict.text for verdict in registry.verdicts(rows)]
            tables = [
                table
                for benchmark in benchmarks
                if (own := [row for row in rows if row["op"] == benchmark.name])
                for table in benchmark.tables(own)
            ]
            shown = [f"images/{path.name}" for path in images.get(device, [])] if page == PLOTTED else []
            points += [noise(rows), *_beyond_cache(result, rows)]
            found.append(Section(_title(result), [_machine(result)], points, shown, tables))
    if page == PLOTTED and all(result["device"] != "cuda" for result in results.values()):
        found.append(Section(text=["No result of a GPU has been recorded yet."]))
    return found or [Section(text=["Nothing has been recorded yet."])]


def _title(result: Result) -> str:
    machine = result["machine"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return f"### {machine['gpu'] if result['device'] == 'cuda' else cpu}"


def _machine(result: Result) -> str:
    machine, commit = result["machine"], result["commit"]
    if result["device"] == "cuda":
        about = f"{machine['gpu_memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']}, "
    else:
        sizes = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
        about = f"{machine['torch_threads']} threads, native library: {machine['native']}, caches of a core: {sizes}, "
    versions = f"torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}"
    changed = " with changes" if commit["dirty"] else ""
    return f"{about}{versions}, commit {commit['id'][:12]}{changed}, {result['datetime'][:10]}."


def _beyond_cache(result: Result, rows: list[Row]) -> list[str]:
    """How far beyond the machine's cache the largest size is; nothing for a device whose caches are not recorded."""
    last = last_level(result["machine"]["caches"]) if result["device"] == "cpu" else None
    moved = [row["bytes_moved"] for row in rows if row["size"] == "beyond-cache"]
    if last is None or not moved:
        return []
    name, size = last
    return [
        f"beyond-cache moves up to {max(moved) / 1e6:.0f} MB a call, {max(moved) / size:.1f} times the last-level "
        f"cache that this machine reports ({name}, {size / 1e6:.0f} MB; a virtual machine may report its whole host's)"
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="recorded results (default: bench/results/*.json)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages (default: %(default)s)")
    given = parser.parse_args(arguments)
    files = given.files or sorted(RESULTS.glob("*.json"))
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    images = {name: plots.draw(result, name, given.docs / "images") for name, result in results.items()}
    pages = write_pages(results, given.docs, images)
    for path in (*(path for drawn in images.values() for path in drawn), *pages):
        print(path)
