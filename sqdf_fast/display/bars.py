"""Bar charts as inline SVG: what was planned, pale, above what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sqdf_fast.display.chart import WIDTH, number, ticks

NAME_WIDTH, RIGHT, TOP, BOTTOM = 112, 46, 6, 34
BAR, GAP = 12, 9


@dataclass(frozen=True)
class Bars:
    """One figure of every name.

    Attributes:
        label: in the legend.
        values: in the order of the names, from 0; None where there is none.
        faint: pale, for what is only planned.
    """

    label: str
    values: Sequence[float | None]
    faint: bool = False


def bar_chart(title: str, names: Sequence[str], groups: Sequence[Bars], unit: str, colour: int = 1) -> str:
    """An SVG figure of horizontal bars, or an empty string when there is no value above 0.

    Args:
        names: of the rows, from the top.
        groups: the bars of a row, from its top; a group without any value is left out.
        unit: under the axis.
        colour: 1 to 4, a colour of the page's stylesheet.
    """
    groups = [group for group in groups if any(map(_is_shown, group.values))]
    highest = max((value for group in groups for value in group.values if value and _is_shown(value)), default=0.0)
    if highest == 0:
        return ""
    row = BAR * len(groups) + GAP
    bottom = TOP + row * len(names)
    scale = (WIDTH - RIGHT - NAME_WIDTH) / highest
    parts = [_grid(highest, scale, bottom, unit)]
    for index, name in enumerate(names):
        top = TOP + row * index + GAP / 2
        middle = top + BAR * len(groups) / 2 + 4
        parts.append(f'<text x="{NAME_WIDTH - 8}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for place, group in enumerate(groups):
            value = group.values[index]
            if value is not None and _is_shown(value):
                parts.append(_bar(f"{name}, {group.label}", value, unit, top + BAR * place, scale, group, colour))
    legend = "".join(
        f'<span><i class="{_classes("key ink", group, colour)}"></i>{escape(group.label)}</span>' for group in groups
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _is_shown(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0


def _grid(highest: float, scale: float, bottom: float, unit: str) -> str:
    parts = []
    for value in ticks(0, highest, count=5):
        x = NAME_WIDTH + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{NAME_WIDTH}" x2="{NAME_WIDTH}" y1="{TOP}" y2="{bottom}"/>')
    middle = (NAME_WIDTH + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{bottom + 29}" text-anchor="middle">{escape(unit)}</text>')
    return "".join(parts)


def _bar(name: str, value: float, unit: str, top: float, scale: float, group: Bars, colour: int) -> str:
    width = value * scale
    shape = f'x="{NAME_WIDTH}" y="{top:.1f}" width="{width:.1f}" height="{BAR - 1}"'
    tip = escape(f"{name}: {value:.4g} {unit}")
    text = f'<text x="{NAME_WIDTH + width + 4:.1f}" y="{top + BAR - 2:.1f}">{value:.3g}</text>'
    return f'<rect class="{_classes("bar fill", group, colour)}" {shape}><title>{tip}</title></rect>{text}'


def _classes(kind: str, group: Bars, colour: int) -> str:
    return f"{kind}{colour}" + (" faint" if group.faint else "")
