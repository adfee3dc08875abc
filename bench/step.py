"""Time the training step of one model, every way to run it side by side.

python bench step                                        # the embedded model on the CPU
python bench step sd15 sdxl --device cuda --output steps.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import registry
from cases.training_step.benchmark import BENCHMARK, group
from cases.training_step.problem import MODELS, problem
from harness.benchmark import Row, measure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["shapes"], help=f"{', '.join(MODELS)}; default: shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--toy", action="store_true", help="tiny and few: does it run, not how fast")
    parser.add_argument("--output", type=Path, help="file of all rows as JSON, rewritten after every model")
    given = parser.parse_args(arguments)
    if unknown := set(given.models) - set(MODELS):
        parser.error(f"model {min(unknown)} is not measured; allowed: {', '.join(MODELS)}")
    rows: list[Row] = []
    for model in given.models:
        measured = measure(BENCHMARK, group(problem(model, given.device, given.toy)), given.toy)
        rows += measured.rows.values()
        own = list(measured.rows.values())
        for title, lines in registry.report(own):
            print("\n".join([title, *lines, *(verdict.text for verdict in registry.verdicts(own))]), flush=True)
        if given.output is not None:
            given.output.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return 1 if any(row["fault"] for row in rows) else 0
