"""Tables of rows, for the terminal and as part of a page; and the one template of all pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sqdf_fast.display import text_table

MARKS = ("<!-- results: written by python bench pages -->", "<!-- end of results -->")
"""Around the generated part of a page."""


@dataclass(frozen=True)
class Column:
    """A column: its heading, the field of a row that it shows, and how."""

    heading: str
    field: str
    form: str | Callable[[Any], str] = ""  # a format specification, or a function of the value
    text: bool = False  # aligned to the left
    against: str = ""  # the contender that is not compared with itself

    def cell(self, row: Mapping[str, Any]) -> str:
        """The row's value as text, "-" for a missing one."""
        value = row.get(self.field)
        if value is None or value == "" or (self.against and row["implementation"] == self.against):
            return "-"
        return self.form(value) if callable(self.form) else format(value, self.form)


@dataclass(frozen=True)
class Table:
    """A table of a page: title above it, heads, rows of cells; the first `text` columns are aligned to the left."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text: int = 1


@dataclass(frozen=True)
class Section:
    """A part of a page, from top to bottom; `image`: its address."""

    heading: str = ""
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    images: Sequence[str] = ()
    tables: Sequence[Table] = ()


def table(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """Rows as a table."""
    text = sum(column.text for column in columns)
    return Table([column.heading for column in columns], [[c.cell(row) for c in columns] for row in rows], title, text)


def of_rows(rows: Iterable[Mapping[str, str]]) -> Table:
    """A table of cells by the heads of their columns."""
    rows = list(rows)
    return Table(list(rows[0]), [list(row.values()) for row in rows])


def as_lines(table: Table) -> list[str]:
    """Aligned lines for the terminal; what the columns before the last one of text repeat is left out."""
    repeatable, above, rows = table.text - 1, None, []
    for row in table.rows:
        rows.append([*([""] * repeatable if row[:repeatable] == above else row[:repeatable]), *row[repeatable:]])
        above = row[:repeatable]
    return text_table(table.heads, rows, left=range(table.text)).splitlines()


def markdown(sections: Iterable[Section]) -> str:
    """Sections as Markdown, through bench/harness/page.md.j2."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.md.j2").render(sections=list(sections)).strip() + "\n"


def write_between_marks(page: Path, sections: Iterable[Section]) -> bool:
    """Replace the text between the marks of a page; False, and no change, for a page without marks."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, mark, rest = text.partition(MARKS[0])
    if mark:
        after = rest.partition(MARKS[1])[2]
        page.write_text(f"{before}{MARKS[0]}\n\n{markdown(sections)}\n{MARKS[1]}{after}", encoding="utf-8")
    return bool(mark)


def duration(seconds: float) -> str:
    """Seconds of one call as text."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
