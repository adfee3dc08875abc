"""Tables for terminals, by rich."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# No table is as wide: a terminal wraps or scrolls, a file keeps its lines.
_WIDTH = 10_000


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns aligned under their heads, without a head line where there are no heads.

    Args:
        rows: as many cells as columns; a shorter row is a name and a remark, printed below the table.
        left: columns aligned to the left; the others to the right.
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
