"""A drawing of a few kinds of shapes, as SVG inside a page, as an SVG file, and as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sqdf_fast.display.chart import MINUS
from sqdf_fast.files import disk_errors

Point = tuple[float, float]

# Colours of up to twelve series, then those of paper, text and grid: on light, on dark.
PALETTE = {
    "s0": ("#2457c5", "#7ba7f7"),
    "s1": ("#c2571a", "#f0995a"),
    "s2": ("#1f8a55", "#6cc896"),
    "s3": ("#8247b5", "#be93ea"),
    "s4": ("#c0342b", "#f08a7e"),
    "s5": ("#0b8799", "#4fc3d1"),
    "s6": ("#8a6d00", "#d9bd4a"),
    "s7": ("#c0398a", "#f07fc0"),
    "s8": ("#56636e", "#a9b4be"),
    "s9": ("#5f8a12", "#b4d465"),
    "s10": ("#7a4a2b", "#cf9f7c"),
    "s11": ("#3d3fa8", "#9a9ff5"),
    "text": ("#1d2129", "#e7e8ea"),
    "soft": ("#626a78", "#9aa2af"),
    "rule": ("#c9c6bf", "#454b56"),
    "grid": ("#eceae5", "#292d35"),
    "card": ("#ffffff", "#1c1f25"),
}
SERIES = 12
SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
_SUPERSAMPLING, _PIXELS = 2, 2


@dataclass(frozen=True)
class Stroke:
    """A line through points."""

    points: Sequence[Point]
    colour: str
    width: float = 1.0
    dashed: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Area:
    """A filled polygon, pale."""

    points: Sequence[Point]
    colour: str
    opacity: float = 0.13


@dataclass(frozen=True)
class Mark:
    """A marker at a point; ``tip`` is what a mouse over it shows."""

    at: Point
    colour: str
    shape: str = "circle"
    radius: float = 3.0
    tip: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text; ``anchor`` is "start", "middle" or "end" of it; ``upwards`` turns it by 90 degrees."""

    at: Point
    text: str
    colour: str = "soft"
    size: float = 11.5
    anchor: str = "start"
    bold: bool = False
    upwards: bool = False


Shape = Stroke | Area | Mark | Text


@dataclass
class Drawing:
    """Shapes, drawn in their order."""

    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Draw these on top."""
        self.shapes += shapes


def stylesheet() -> str:
    """What the colours' classes mean, light and dark."""
    light, dark = (
        "".join(f".{name}{{color:{colours[index]}}}" for name, colours in PALETTE.items()) for index in (0, 1)
    )
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}@media print{{{light}}}"


def inline_svg(drawing: Drawing) -> str:
    """The drawing as an element of a page that has :func:`stylesheet`."""
    body = "".join(_svg(shape) for shape in drawing.shapes)
    return (
        f'<svg viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" aria-label="{escape(drawing.title)}">'
        f"{body}</svg>"
    )


def save(drawing: Drawing, path: Path) -> None:
    """Write ``path``.svg and ``path``.png. Raises UserError when the disk refuses."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".svg").write_text(_svg_file(drawing), encoding="utf-8")
        render(drawing).save(path.with_suffix(".png"), format="PNG")


def _svg_file(drawing: Drawing) -> str:
    size = f'width="{drawing.width:g}" height="{drawing.height:g}" viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    heading = Text((14, 22), drawing.title, "text", 14, bold=True)
    body = "".join(_svg(shape) for shape in (heading, *drawing.shapes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
        f"<style>{stylesheet()}</style>"
        f'<rect class="card" width="100%" height="100%" fill="currentColor"/>{body}</svg>\n'
    )


def _svg(shape: Shape) -> str:
    if isinstance(shape, Text):
        turn = f' transform="rotate(-90 {shape.at[0]:.1f} {shape.at[1]:.1f})"' if shape.upwards else ""
        weight = ' font-weight="600"' if shape.bold else ""
        return (
            f'<text class="{shape.colour}" x="{shape.at[0]:.1f}" y="{shape.at[1]:.1f}" fill="currentColor" '
            f'style="font-size:{shape.size:g}px" text-anchor="{shape.anchor}"{weight}{turn}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, Stroke):
        dash = ' stroke-dasharray="5 4"' if shape.dashed else ""
        return (
            f'<polyline class="{shape.colour}" points="{_pairs(shape.points)}" fill="none" stroke="currentColor" '
            f'stroke-width="{shape.width:g}" stroke-linejoin="round" opacity="{shape.opacity:g}"{dash}/>'
        )
    if isinstance(shape, Area):
        points = _pairs(shape.points)
        return f'<polygon class="{shape.colour}" points="{points}" fill="currentColor" opacity="{shape.opacity:g}"/>'
    tip = f"<title>{escape(shape.tip)}</title>" if shape.tip else ""
    if shape.shape == "circle":
        x, y = shape.at
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="{shape.radius:g}"'
        return f'<circle class="{shape.colour}" {place} fill="currentColor">{tip}</circle>'
    outline = _pairs(_outline(shape))
    return f'<polygon class="{shape.colour}" points="{outline}" fill="currentColor">{tip}</polygon>'


def _pairs(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _outline(mark: Mark) -> list[Point]:
    (x, y), r = mark.at, mark.radius
    unit: dict[str, list[Point]] = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "down": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "cross": [
            *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
            *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        ],
    }
    return [(x + dx * r, y + dy * r) for dx, dy in unit[mark.shape]]


def render(drawing: Drawing) -> Image.Image:
    """The drawing with its title, on light paper, at two pixels a unit."""
    scale = _SUPERSAMPLING * _PIXELS
    size = (round(drawing.width * scale), round(drawing.height * scale))
    picture = Image.new("RGB", size, PALETTE["card"][0])
    _draw(picture, Text((14, 22), drawing.title, "text", 14, bold=True), scale)
    for shape in drawing.shapes:
        _draw(picture, shape, scale)
    return picture.resize((size[0] // _SUPERSAMPLING, size[1] // _SUPERSAMPLING), Image.Resampling.BOX)


def _draw(picture: Image.Image, shape: Shape, scale: float) -> None:
    colour = PALETTE[shape.colour][0]
    pen = ImageDraw.Draw(picture)
    if isinstance(shape, Text):
        _draw_text(picture, shape, scale)
    elif isinstance(shape, Stroke):
        colour = _mixed(colour, shape.opacity)
        points = [(x * scale, y * scale) for x, y in shape.points]
        width = max(1, round(shape.width * scale))
        if shape.dashed:
            for start, end in _dashes(points, 5 * scale, 4 * scale):
                pen.line([start, end], colour, width)
        else:
            pen.line(points, colour, width, joint="curve")
    elif isinstance(shape, Area):
        over = Image.new("L", picture.size, 0)
        ImageDraw.Draw(over).polygon([(x * scale, y * scale) for x, y in shape.points], round(255 * shape.opacity))
        picture.paste(Image.new("RGB", picture.size, colour), (0, 0), over)
    elif shape.shape == "circle":
        (x, y), r = shape.at, shape.radius
        pen.ellipse([(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale], colour)
    else:
        pen.polygon([(x * scale, y * scale) for x, y in _outline(shape)], colour)


def _draw_text(picture: Image.Image, text: Text, scale: float) -> None:
    font = ImageFont.load_default(size=text.size * scale)
    # The default font has no minus.
    words = text.text.replace(MINUS, "-")
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    x, y = text.at[0] * scale, text.at[1] * scale
    colour = PALETTE[text.colour][0]
    # The default font has one weight.
    width = round(0.35 * scale) if text.bold else 0
    if not text.upwards:
        pen = ImageDraw.Draw(picture)
        pen.text((x, y), words, colour, font, anchor, stroke_width=width, stroke_fill=colour)
        return
    long, high = round(font.getlength(words)) + 4, round(text.size * scale * 1.5)
    mask = Image.new("L", (long, high), 0)
    ImageDraw.Draw(mask).text((long / 2, high * 0.75), words, 255, font, "ms")
    mask = mask.rotate(90, expand=True)
    place = (round(x - high * 0.75), round(y - long / 2))
    picture.paste(Image.new("RGB", mask.size, colour), place, mask)


def _mixed(colour: str, opacity: float) -> str:
    paper = PALETTE["card"][0]
    parts = [round(opacity * int(colour[i : i + 2], 16) + (1 - opacity) * int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def _dashes(points: Sequence[Point], on: float, off: float) -> list[tuple[Point, Point]]:
    dashes, phase = [], 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while at < length:
            left = (on - phase) if phase < on else (on + off - phase)
            end = min(length, at + left)
            if phase < on:
                near, far = at / length, end / length
                dashes.append(
                    ((x0 + near * (x1 - x0), y0 + near * (y1 - y0)), (x0 + far * (x1 - x0), y0 + far * (y1 - y0)))
                )
            phase = (phase + end - at) % (on + off)
            at = end
    return dashes
