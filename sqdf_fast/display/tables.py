"""Tables for terminals, by rich."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wider than any table, so that rich does not wrap.
_WIDTH = 10_000


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns aligned under their heads; no head line without heads.

    Args:
        rows: a cell per column; shorter rows, a name and a remark, are printed below the table.
        left: left-aligned columns; the others are right-aligned.
    """
    rows = [list(row) for row in rows]
    columns = len(heads) or max(map(len, rows))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(heads))
    for index in range(columns):
        head = Text(heads[index]) if heads else ""
        table.add_column(head, justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        if len(row) == columns:
            table.add_row(*map(Text, row))
    output = io.StringIO()
    if table.row_count:
        Console(file=output, width=_WIDTH, color_system=None).print(table)
    lines = output.getvalue().splitlines()
    remarks = [": ".join(row) for row in rows if len(row) < columns]
    return "\n".join([*(line.rstrip() for line in lines), *remarks])
