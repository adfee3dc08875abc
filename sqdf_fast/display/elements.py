"""Pieces of HTML that more than one section of a report is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from sqdf_fast.display.chart import MINUS

# A figure, and its interval where it has one.
_END = rf"([+{MINUS}]?[\d.]+)"
_INTERVAL = re.compile(rf"(\S+) \[{_END}, {_END}\]")


def tile(value: str, name: str, detail: str = "", good: bool | None = None) -> str:
    """A large figure with its name; ``good`` colours it."""
    mood = "" if good is None else " good" if good else " bad"
    value = value.replace("-", MINUS)
    lines = "".join(f"<span>{escape(text)}</span>" for text in (name, detail) if text)
    return f'<div class="tile{mood}"><b>{escape(value)}</b>{lines}</div>'


def figure_table(heads: Sequence[str], rows: Iterable[Sequence[str]], differences: bool = False) -> str:
    """A table under named columns.

    Args:
        rows: each begins with its name; the other cells are figures, "mean [low, high]", or remarks. The last cell of a
            row that is too short takes the columns that are left.
        differences: figures whose interval leaves out 0 are emphasised.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(_cells(row, len(heads), differences))}</tr>" for row in rows)
    return f'<div class="figures"><table><tr>{head}</tr>{body}</table></div>'


def _cells(row: Sequence[str], columns: int, differences: bool) -> Iterable[str]:
    yield f'<th scope="row">{escape(row[0])}</th>'
    for index, cell in enumerate(row[1:], 2):
        span = f' colspan="{columns - index + 1}"' if index == len(row) < columns else ""
        if cell[:1] not in "+-0123456789":
            yield f"<td{span}>{escape(cell)}</td>"
        else:
            yield f'<td class="figure"{span}>{_figure(cell, differences)}</td>'


def _figure(cell: str, differences: bool) -> str:
    text = escape(cell.replace("-", MINUS))
    found = _INTERVAL.fullmatch(text)
    if found is None:
        return text
    mean, low, high = found.groups()
    if differences and _number(low) * _number(high) > 0:
        mean = f"<b>{mean}</b>"
    return f"{mean}<small>{low} to {high}</small>"


def _number(text: str) -> float:
    return float(text.replace(MINUS, "-"))
