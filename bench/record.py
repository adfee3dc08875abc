"""Files what `pytest bench/ --benchmark-only --benchmark-json=FILE` or `python bench/gpu` wrote: one file a device.

python bench/record.py build/bench.json        # -> bench/results/<device>.json, one row a line
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_ops.machine import device_name
from fused_ops.summary import verdicts

from sqdf_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"
FUSED_OPS = ("denoise_step", "posterior_mean", "discounted_loss", "philox")
"""What docs/benchmarks.md and its plots are of."""
OTHERS = ("training_step", "sampling", "adamw_8bit")
"""Benchmarks with pages of their own."""


def record(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write a file for every device of a benchmark run, or of a run of bench/gpu, into `folder`.

    Raises:
        UserError: nothing was measured, or toy sizes were.
    """
    if "parts" in found:
        found = _of_gpu(found)
    rows = [
        row for benchmark in found["benchmarks"] if (row := benchmark["extra_info"]).get("op") in FUSED_OPS + OTHERS
    ]
    if not rows or any(row["toy"] for row in rows):
        raise UserError("this run has no figures worth keeping: run the benchmarks without --toy")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device and row["op"] in FUSED_OPS]
        others = [_without_samples(row) for row in rows if row["device"] == device and row["op"] in OTHERS]
        head = {
            "device": device,
            "machine": found["machine_info"],
            "commit": found["commit_info"],
            "datetime": found["datetime"],
            "targets": [{"text": str(verdict), "met": verdict.met} for verdict in verdicts(own)],
        }
        path = folder / f"{device_name(found['machine_info'], device)}.json"
        lists = f' "rows": {_lines(own)},\n "others": {_lines(others)}}}\n'
        path.write_text(f"{json.dumps(head, indent=1)[:-2]},\n{lists}", encoding="utf-8")
        written.append(path)
    return written


def _lines(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def _without_samples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "samples"}


def _of_gpu(found: dict[str, Any]) -> dict[str, Any]:
    """The file of bench/gpu in the form of --benchmark-json."""
    parts = {name: part.get("result", {}) for name, part in found["parts"].items()}
    commit = found["commit"] or "unknown"
    rows = [row for name in ("training step", "benchmarks") for row in parts.get(name, {}).get("rows", [])]
    return {
        "machine_info": parts.get("machine", {}),
        "commit_info": {"id": commit.removesuffix("+changes"), "dirty": commit.endswith("+changes")},
        "datetime": found["started"],
        "benchmarks": [{"extra_info": row} for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what --benchmark-json or bench/gpu wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        written = record(json.loads(given.file.read_text(encoding="utf-8")), given.results)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
