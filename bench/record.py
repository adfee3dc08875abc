"""File what `pytest bench/ --benchmark-only --benchmark-json=FILE` or `python bench gpu` wrote: one file a device.

python bench record build/bench.json        # -> bench/results/<device>.json, one row a line
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import registry
from harness.machine import device_name

from sqdf_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"


def record(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write a file for every device of a benchmark run, or of a run of `python bench gpu`, into `folder`.

    Raises:
        UserError: nothing was measured, or toy sizes were.
    """
    if "parts" in found:
        found = _of_gpu(found)
    known = {benchmark.name for benchmark in registry.BENCHMARKS}
    rows = [row for benchmark in found["benchmarks"] if (row := benchmark["extra_info"]).get("op") in known]
    if not rows or any(row["toy"] for row in rows):
        raise UserError("this run has no figures worth keeping: run the benchmarks without --toy")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        head = {
            "device": device,
            "machine": found["machine_info"],
            "commit": found["commit_info"],
            "datetime": found["datetime"],
            "targets": [verdict._asdict() for verdict in registry.verdicts(own)],
        }
        lines = ",\n".join(map(json.dumps, own))
        path = folder / f"{device_name(found['machine_info'], device)}.json"
        path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")
        written.append(path)
    return written


def _of_gpu(found: dict[str, Any]) -> dict[str, Any]:
    """The file of `python bench gpu` in the form of --benchmark-json."""
    runs = [part["result"] for part in found["parts"].values() if part.get("result", {}).get("benchmarks")]
    benchmarks = [benchmark for run in runs for benchmark in run["benchmarks"]]
    return {**(runs[0] if runs else {}), "benchmarks": benchmarks}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what --benchmark-json or `python bench gpu` wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into (default: %(default)s)")
    given = parser.parse_args(arguments)
    for path in record(json.loads(given.file.read_text(encoding="utf-8")), given.results):
        print(path)
