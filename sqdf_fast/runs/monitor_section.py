"""The report's section on over-optimisation: the trained reward beside what training does not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sqdf_fast.display.chart import Line, Point, line_chart
from sqdf_fast.monitor import HELD_OUT, PROXY, TOLERANCE, watched
from sqdf_fast.runs.metrics import Record

QUIET = "The monitor saw no judge fall while the trained reward rose."
CONSEQUENCES = {
    "warn": "The run went on; the weights before the turn are those of an earlier checkpoint, if it wrote one.",
    "stop": "The run ended there.",
    "restore": "The run ended there, and its result holds the weights of step {best_step}.",
}


def monitor_section(config: Mapping[str, Any], evaluations: Sequence[Record], alarms: Sequence[Record]) -> str:
    """HTML; empty where the monitor was off or had nothing to hear twice.

    Args:
        config: the run's nested settings; evaluations, alarms: its records of these kinds.
    """
    action = (config.get("monitor") or {}).get("action", "off")
    if action == "off" or len(evaluations) < 2 or not watched(evaluations):
        return ""
    said = [_sentence(alarm, action) for alarm in alarms] or [QUIET]
    charts = _rewards(evaluations, alarms) + _kept(evaluations, alarms) + _divergence(evaluations, alarms)
    mood = "verdict" if alarms else "soft"
    text = "".join(f'<p class="{mood}">{escape(sentence)}</p>' for sentence in said)
    return f'<h2>Over-optimisation</h2>{text}<div class="charts">{charts}</div>'


def _sentence(alarm: Record, action: str) -> str:
    reason = str(alarm.get("reason", "the judges fell"))
    consequence = CONSEQUENCES.get(action, "").format(best_step=alarm.get("best_step", "unknown"))
    return f"Alarm at step {alarm['step']}: {reason}. {consequence}".strip()


def _rewards(evaluations: Sequence[Record], alarms: Sequence[Record]) -> str:
    held_out = [key for key in watched(evaluations) if key.startswith(HELD_OUT)]
    if not held_out:
        return ""
    # Rewards have scales of their own: gains are in the width of the interval at the start.
    keys = {PROXY: "trained on", **{key: f"held out: {key.removeprefix(HELD_OUT)}" for key in held_out[:3]}}
    lines = [Line(label, _gain(evaluations, key), colour) for colour, (key, label) in enumerate(keys.items(), start=1)]
    return _chart("Gain of the rewards, in widths of their first interval", lines, alarms)


def _gain(evaluations: Sequence[Record], key: str) -> list[Point]:
    known = [record for record in evaluations if record.get(key) is not None]
    if not known or known[0].get(f"{key}_low") is None:
        return []
    width = known[0][f"{key}_high"] - known[0][f"{key}_low"]
    return [(record["step"], (record[key] - known[0][key]) / width) for record in known] if width else []


def _kept(evaluations: Sequence[Record], alarms: Sequence[Record]) -> str:
    lines = []
    for colour, key in enumerate(TOLERANCE, start=2):
        known = [record for record in evaluations if record.get(key) is not None]
        if known and known[0][key] > 0:
            points = [(record["step"], record[key] / known[0][key]) for record in known]
            lines.append(Line(key.removeprefix("eval_").replace("_", " "), points, colour))
    return _chart("What is left of the base model's", lines, alarms, include=(0, 1))


def _divergence(evaluations: Sequence[Record], alarms: Sequence[Record]) -> str:
    points = [(record["step"], record["eval_kl"]) for record in evaluations if record.get("eval_kl") is not None]
    return _chart("KL from the base model at the evaluations", [Line("", points, 4)], alarms)


def _chart(title: str, lines: Sequence[Line], alarms: Sequence[Record], include: Sequence[float] = ()) -> str:
    heights = [y for line in lines for _, y in line.points] + list(include)
    marks = [
        Line(
            f"alarm at step {alarm['step']}",
            [(alarm["step"], min(heights)), (alarm["step"], max(heights))],
            2,
            dashed=True,
        )
        for alarm in alarms
        if heights
    ]
    return line_chart(title, [*lines, *marks], include=include)
