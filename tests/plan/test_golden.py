"""Plans of every family for common cards, made again from nothing: simulations, search and whole peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from plan.write_golden import BUDGETS, FAMILIES, FOLDER

from sqdf_fast.plan import Plan, find_device, parse_memory, reserve_bytes
from sqdf_fast.plan.device import GIB
from sqdf_fast.plan.planner import paper_config
from sqdf_fast.plan.search import Profile, choices, fastest


def golden(family):
    found = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))
    profiles = {name: Profile.from_values(values) for name, values in found["profiles"].items()}
    plans = {budget: Plan.from_json(json.dumps(plan)) for budget, plan in found["plans"].items()}
    return profiles, plans


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_golden_plan_is_the_fastest_that_fits(family, budget):
    profiles, plans = golden(family)
    plan, vram = plans[budget], parse_memory(budget)
    config, device = paper_config(family), find_device(None, vram)
    limit = vram - reserve_bytes(vram)
    found = [choice for name in profiles for choice in choices(profiles[name], config, device)]
    if not plan.fits:
        assert plan.peak_gib * GIB > limit
        assert "short by" in plan.advice
        return
    assert plan.peak_gib * GIB <= limit
    # One that the estimate let pass and the whole simulation did not is skipped; there are few of them.
    for _ in range(4):
        choice = fastest(found, limit)
        if choice.settings == plan.settings:
            break
        found.remove(choice)
    assert choice.settings == plan.settings
    assert choice.total_seconds == pytest.approx(plan.predicted_seconds, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_near_what_the_whole_simulation_says(family):
    profiles, plans = golden(family)
    for budget, plan in plans.items():
        device = find_device(None, parse_memory(budget))
        every = [c for name in profiles for c in choices(profiles[name], paper_config(family), device)]
        (estimate,) = [choice for choice in every if choice.settings == plan.settings]
        assert estimate.peak_bytes / GIB == pytest.approx(plan.peak_gib, rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_simulated_again(family):
    # In a process of its own, as the command that plans is: what other tests left alive would be counted.
    command = [sys.executable, "-P", str(FOLDER.parent / "write_golden.py"), family]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    again = json.loads(made.stdout)
    assert again == json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))


def test_int8_weights_never_come_and_go():
    profiles, _ = golden("sdxl")
    moved = {
        name: {
            choice.settings["execution.residency"]
            for choice in choices(
                replace(profiles["none"], quantization=name), paper_config("sdxl"), find_device(None, GIB)
            )
        }
        for name in ("nf4", "int8")
    }
    assert moved == {"nf4": {"resident", "staged"}, "int8": {"resident"}}
