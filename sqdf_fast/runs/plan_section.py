"""The report's section on memory and time: the plan beside what was measured, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sqdf_fast.display.bars import Bars, bar_chart
from sqdf_fast.display.elements import figure_table, tile
from sqdf_fast.display.progress import format_bytes, format_seconds
from sqdf_fast.runs.comparison import GIB, Comparison, difference

HEADING, UNPLANNED = "Memory and time against the plan", "Memory and time of the stages"
_NONE = "\N{EN DASH}"
_HEADS = (
    "stage",
    "memory planned",
    "memory measured",
    "difference",
    "time planned",
    "time measured",
    "difference",
    "note",
)


def plan_section(found: Comparison, plan: Mapping[str, Any], on_gpu: bool) -> str:
    """HTML; empty for a run that had neither a plan nor measured stages."""
    if not found:
        return ""
    texts = [text for text in (_lead(found, plan), _missing(found, on_gpu)) if text]
    remarks = "".join(f'<p class="soft">{escape(text)}</p>' for text in texts)
    tiles = f'<div class="tiles">{_tiles(found)}</div>'
    heading = HEADING if found.planned else UNPLANNED
    return f"<h2>{heading}</h2>{remarks}{tiles}{_table(found)}{_charts(found)}{_events(found)}"


def _lead(found: Comparison, plan: Mapping[str, Any]) -> str:
    said = []
    if found.planned:
        facts = [f"{plan['executor']} executor"] if plan.get("executor") else []
        facts += [f"micro-batch {plan['micro_batch']}"] if plan.get("micro_batch") else []
        facts += [f"{format_bytes(found.reserve)} kept in reserve"] if found.reserve else []
        said.append("Planned before the run" + (": " + ", ".join(facts) if facts else "") + ".")
        if plan.get("fits") is False:
            said.append("The plan said that the run would not fit.")
    if found.measured_steps:
        steps = "1 step" if found.measured_steps == 1 else f"{found.measured_steps} steps"
        said.append(f"Stages were measured in {steps}: their largest peak and their median time.")
    return " ".join(said)


def _missing(found: Comparison, on_gpu: bool) -> str:
    said = []
    if not found.planned:
        said.append("The run has no plan that can be read (plan.json), so nothing is compared.")
    if not found.measured_steps:
        said.append("No step was measured stage by stage.")
    if not on_gpu and found.measured_peak is None and found.joules is None:
        said.append("Memory of the stages and energy are measured on a GPU only.")
        return " ".join(said)
    if found.measured_peak is None:
        said.append("The peak was not measured.")
    elif found.measured_steps and all(stage.measured_bytes is None for stage in found.stages):
        said.append("The memory of the stages was not measured.")
    if found.joules is None:
        said.append("Energy was not measured.")
    return " ".join(said)


def _tiles(found: Comparison) -> str:
    tiles = []
    if found.measured_peak is not None:
        over = found.planned_peak is not None and found.measured_peak > found.planned_peak + (found.reserve or 0)
        detail = _against(found.planned_peak, found.measured_peak, format_bytes)
        tiles.append(tile(format_bytes(found.measured_peak), "peak memory", detail, False if over else None))
    elif found.planned_peak is not None:
        tiles.append(tile(format_bytes(found.planned_peak), "peak memory, planned"))
    if found.measured_seconds is not None:
        detail = _against(found.planned_seconds, found.measured_seconds, _time)
        tiles.append(tile(_time(found.measured_seconds), "a step, sampling included", detail))
    elif found.planned_seconds is not None:
        tiles.append(tile(_time(found.planned_seconds), "a step, planned"))
    if found.joules is not None:
        tiles.append(tile(_energy(found.joules), "a step, the whole GPU"))
    return "".join(tiles)


def _table(found: Comparison) -> str:
    rows = [
        [
            stage.name,
            *_cells(stage.planned_bytes, stage.measured_bytes, format_bytes),
            *_cells(stage.planned_seconds, stage.measured_seconds, _time),
            stage.note,
        ]
        for stage in found.stages
    ]
    if not rows:
        return ""
    total = [
        *_cells(found.planned_peak, found.measured_peak, format_bytes),
        *_cells(found.planned_seconds, found.measured_seconds, _time),
    ]
    rows.append(["whole step", *total, ""])
    filled = [0, *(column for column in range(1, len(_HEADS)) if any(row[column].strip(_NONE) for row in rows))]
    return figure_table([_HEADS[column] for column in filled], [[row[column] for column in filled] for row in rows])


def _charts(found: Comparison) -> str:
    names = [stage.name for stage in found.stages]
    memory = [
        Bars("planned", [_in(stage.planned_bytes, GIB) for stage in found.stages], faint=True),
        Bars("measured", [_in(stage.measured_bytes, GIB) for stage in found.stages]),
    ]
    seconds = [
        Bars("planned", [stage.planned_seconds for stage in found.stages], faint=True),
        Bars("measured", [stage.measured_seconds for stage in found.stages]),
    ]
    drawn = bar_chart("Peak memory of a stage", names, memory, "GiB")
    drawn += bar_chart("Time of a stage in a step", names, seconds, "seconds", colour=2)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _events(found: Comparison) -> str:
    items = "".join(f"<li>Step {step}: {escape(text)}</li>" for step, text in found.events)
    return f'<ul class="events">{items}</ul>' if items else ""


def _cells(planned: float | None, measured: float | None, shown: Any) -> list[str]:
    return [
        _NONE if planned is None else shown(planned),
        _NONE if measured is None else shown(measured),
        difference(planned, measured) or _NONE,
    ]


def _against(planned: float | None, measured: float, shown: Any) -> str:
    if planned is None:
        return ""
    return f"planned {shown(planned)} ({difference(planned, measured)})" if planned else f"planned {shown(planned)}"


def _in(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else format_seconds(seconds)


def _energy(joules: float) -> str:
    return f"{joules:.3g} J" if joules < 1000 else f"{joules / 1000:.3g} kJ"
