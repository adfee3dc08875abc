"""Golden plans, a minute or two a family.

PYTHONPATH=tests python tests/plan/write_golden.py sdxl            # prints them
PYTHONPATH=tests python tests/plan/write_golden.py --write         # writes those of every family
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sqdf_fast.plan import Planner, find_device, parse_memory
from sqdf_fast.plan.planner import paper_config

FOLDER = Path(__file__).parent / "golden"
FAMILIES = {"sd15": (), "sdxl": (), "sd35-medium": (), "flux1-dev": ("nf4",)}
BUDGETS = ("24G", "16G", "12G", "8G")


def golden_plans(family: str, use_cache: bool = True) -> dict[str, object]:
    """The plans of one family by budget, and the profiles that they were chosen from."""
    planner = Planner(paper_config(family), FAMILIES[family], use_cache)
    plans = {}
    for budget in BUDGETS:
        vram = parse_memory(budget)
        plans[budget] = json.loads(planner.plan(vram, find_device(None, vram)).as_json())
    profiles = {name: planner.profile(name).as_values() for name in planner.quantizations}
    return {"profiles": profiles, "plans": plans}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    given = parser.parse_args()
    for name in given.families:
        text = json.dumps(golden_plans(name, use_cache=False), indent=1, sort_keys=True)
        if given.write:
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        else:
            sys.stdout.write(text + "\n")
