"""`python -m sqdf_fast.plan table [--write FILE]`: the memory table of docs/memory.md, from simulation alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sqdf_fast.plan.table import ROWS, memory_table, simulated, write_between_marks


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(prog="python -m sqdf_fast.plan", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="the memory table, simulated")
    table.add_argument("--write", nargs="?", type=Path, const=Path("docs/memory.md"), help="page to write it into")
    given = parser.parse_args()
    text = memory_table([simulated(row) for row in ROWS])
    if given.write is None:
        sys.stdout.write(text)
    else:
        write_between_marks(given.write, text)


main()
