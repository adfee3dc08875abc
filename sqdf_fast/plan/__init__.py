"""How a run fits a card: simulated on tensors without values, searched for the fastest, predicted stage by stage."""

from __future__ import annotations

from sqdf_fast.plan.device import Device, find_device, parse_memory, reserve_bytes
from sqdf_fast.plan.planner import Plan, PlannedStage, Planner, make_plan

__all__ = [
    "Device",
    "Plan",
    "PlannedStage",
    "Planner",
    "find_device",
    "make_plan",
    "parse_memory",
    "reserve_bytes",
]
