"""`python bench COMMAND`: everything in bench/ but the benchmarks themselves."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sqdf_fast.errors import UserError

COMMANDS = {
    "gpu": ("gpu", "tests and benchmarks on one GPU, in under 9 minutes"),
    "record": ("record", "file the JSON of a benchmark run in bench/results/"),
    "pages": ("pages", "draw the recorded results and write their tables into docs/"),
    "study": ("study.comparison", "write the pages of the study on the embedded model"),
    "monitor": ("study.monitor", "when the over-optimization monitor raises an alarm, on several seeds"),
    "seeds": ("study.seeds", "the shipped default run on several seeds"),
    "machine": ("harness.machine", "what a recorded result says about this machine, as JSON"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    commands = "".join(f"  {name:9}{about}\n" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python bench",
        description="Commands of bench/; pytest bench/ --benchmark-only measures.",
        epilog=f"commands, each with --help:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(arguments)
    try:
        return importlib.import_module(COMMANDS[given.command][0]).main(given.arguments) or 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
