"""Pages by jinja2 with autoescape: one HTML file without network requests."""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from sqdf_fast import __version__
from sqdf_fast.display.plots import dark_css
from sqdf_fast.display.units import MINUS, format_bytes, format_duration, format_energy

# Pixels: larger images are scaled down, so that a report stays a few megabytes.
EMBEDDED_SIDE = 384
_END = rf"([+{MINUS}]?[\d.]+)"
_INTERVAL = re.compile(rf"(\S+) \[{_END}, {_END}\]")


def render_page(template: Path, **values: Any) -> str:
    """The page of a template that extends ``page.html`` of this package, as text."""
    return environment(template.parent).get_template(template.name).render(values)


@cache
def environment(folder: Path | None = None) -> Environment:
    """Jinja's environment for the templates in ``folder`` and in this package."""
    own = Path(__file__).parent / "templates"
    found = Environment(
        loader=FileSystemLoader([folder, own] if folder else [own]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        minus=lambda text: text.replace("-", MINUS),
        figure=figure,
        bytes=format_bytes,
        duration=format_duration,
        energy=format_energy,
        setting=setting,
    )
    found.globals.update(version=__version__, plot_css=dark_css(), image_uri=image_uri)
    return found


class Figure(NamedTuple):
    """A number in a table, its interval, and whether the interval excludes 0."""

    mean: str
    interval: str = ""
    clear: bool = False


def figure(cell: str) -> Figure | None:
    """A table's cell "mean [low, high]" or "number"; None for a remark."""
    if cell[:1] not in "+-0123456789":
        return None
    text = cell.replace("-", MINUS)
    match = _INTERVAL.fullmatch(text)
    if match is None:
        return Figure(text)
    mean, low, high = match.groups()
    ends = [float(end.replace(MINUS, "-")) for end in (low, high)]
    return Figure(mean, f"{low} to {high}", ends[0] * ends[1] > 0)


def setting(value: Any) -> str:
    """A configuration's value: "on", "none", items separated by commas."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value))
    return str(value)


def image_uri(source: Path | Image.Image | None) -> str | None:
    """An image as a data URI; None for a missing or damaged file."""
    if source is None:
        return None
    if isinstance(source, Image.Image):
        return _uri(source, "png")
    try:
        content = source.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if max(image.size) > EMBEDDED_SIDE:
                small = image.convert("RGB")
                small.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
                return _uri(small, "jpeg", quality=90)
    except (OSError, SyntaxError, UnidentifiedImageError):
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
