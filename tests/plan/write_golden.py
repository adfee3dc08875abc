"""Golden plans, and the rows of the memory table: a minute or two each.

PYTHONPATH=tests python tests/plan/write_golden.py sdxl                     # prints a family's plans
PYTHONPATH=tests python tests/plan/write_golden.py "SD1.5 512 px, full"     # prints a row
PYTHONPATH=tests python tests/plan/write_golden.py --write                  # writes all, and docs/memory.md's table
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqdf_fast.plan import Planner, find_device, parse_memory
from sqdf_fast.plan.fake import only_new_garbage
from sqdf_fast.plan.planner import paper_config
from sqdf_fast.plan.table import ROWS, Line, memory_table, simulated, write_between_marks

FOLDER = Path(__file__).parent / "golden"
TABLE = FOLDER / "table.json"
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
FAMILIES = {"sd15": (), "sdxl": (), "sd35-medium": (), "flux1-dev": ("nf4",)}
BUDGETS = ("24G", "16G", "12G", "8G")
TITLES = {row.title: row for row in ROWS}


def golden_plans(family: str, budgets: Iterable[str] = BUDGETS) -> dict[str, Any]:
    """The plans of one family by budget, and the profiles that they were chosen from."""
    planner = Planner(paper_config(family), FAMILIES[family], use_cache=False)
    plans = {}
    with only_new_garbage():
        for budget in budgets:
            vram = parse_memory(budget)
            plans[budget] = json.loads(planner.plan(vram, find_device(None, vram)).as_json())
    profiles = {name: asdict(planner.profile(name)) for name in planner.quantizations}
    return {"profiles": profiles, "plans": plans}


def made(name: str) -> dict[str, Any]:
    """What the file of a family, or the memory table of a row, should hold."""
    return golden_plans(name) if name in FAMILIES else asdict(simulated(TITLES[name], use_cache=False))


def lines() -> list[Line]:
    """Those of the memory table, in its order."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    return [Line(**stored[title]) for title in TITLES]


def write(names: Iterable[str]) -> None:
    """The files of these families and rows, a row at a time, and the page from all rows."""
    for name in names:
        if name in FAMILIES:
            _write(FOLDER / f"{name}.json", made(name))
        else:
            stored = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
            _write(TABLE, stored | {name: made(name)})
    write_between_marks(PAGE, memory_table(lines()))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(_text(values), encoding="utf-8")


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", default=[*FAMILIES, *TITLES], help="families and titles of rows")
    given = parser.parse_args()
    if given.write:
        write(given.names)
    else:
        sys.stdout.writelines(_text(made(name)) for name in given.names)
