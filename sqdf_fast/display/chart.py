"""Line charts as inline SVG: sharp on paper, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40
RIGHT_AXIS = 52
MINUS = "\N{MINUS SIGN}"

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: in the legend; empty for none.
        points: (x, y), x rising.
        colour: 1 to 4, a colour of the page's stylesheet.
        band: (low, high) around each point, or None.
        faint: thin and pale, for raw values under a smoothed curve.
        dashed: for baselines.
        right: measured on an axis of its own, at the right.
    """

    label: str
    points: Sequence[Point]
    colour: int = 1
    band: Sequence[Point] | None = None
    faint: bool = False
    dashed: bool = False
    right: bool = False


@dataclass(frozen=True)
class _Axis:
    """Values ``low`` to ``high`` onto pixels ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "step",
    y_label: str = "",
    right_label: str = "",
    include: Sequence[float] = (),
) -> str:
    """An SVG figure, or an empty string when no line has a point. Values that are not finite are left out.

    Args:
        lines: x is a whole number: a step or an index.
        include: values that the left axis must reach, such as 0 where shares are compared.
    """
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    second = [line for line in lines if line.right]
    first = [line for line in lines if not line.right] or second
    plot_right = WIDTH - (RIGHT_AXIS if second else RIGHT)
    x_axis = _axis([x for line in lines for x, _ in line.points], LEFT, plot_right, padded=False)
    left = _axis([*_extent(first), *include], HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, left, plot_right, x_label, y_label)]
    right = left
    if second and second is not first:
        right = _axis(_extent(second), HEIGHT - BOTTOM, TOP)
        parts.append(_right_axis(right, plot_right, right_label, second[0].colour))
    parts += [_curve(line, x_axis, right if line.right else left) for line in lines]
    legend = "".join(_legend_entry(line) for line in lines if line.label)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean of up to ``window`` neighbours; shorter at the ends."""
    half = window // 2
    values = [y for _, y in points]
    averaged = []
    for index, (x, _) in enumerate(points):
        near = values[max(0, index - half) : index + half + 1]
        averaged.append((x, sum(near) / len(near)))
    return averaged


def ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """Up to ``count`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [index * spacing for index in range(first, last + 1)]


def _finite(line: Line) -> Line:
    kept = [index for index, (x, y) in enumerate(line.points) if math.isfinite(x) and math.isfinite(y)]
    points = [line.points[index] for index in kept]
    band = None if line.band is None else [line.band[index] for index in kept]
    return Line(line.label, points, line.colour, band, line.faint, line.dashed, line.right)


def _extent(lines: Sequence[Line]) -> list[float]:
    heights = [y for line in lines for _, y in line.points]
    return heights + [edge for line in lines for edges in line.band or () for edge in edges]


def _axis(values: Sequence[float], start: float, end: float, padded: bool = True) -> _Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = 0.5 * max(abs(low), 1.0) if padded else 0.5
        low, high = low - margin, high + margin
    elif padded:
        margin = 0.06 * (high - low)
        # Quantities that cannot be negative keep their zero.
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    return _Axis(low, high, start, end)


def _grid(x_axis: _Axis, y_axis: _Axis, plot_right: float, x_label: str, y_label: str) -> str:
    parts = []
    bottom = HEIGHT - BOTTOM
    for value in ticks(y_axis.low, y_axis.high):
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{plot_right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    parts += [
        f'<text x="{x_axis(value):.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
        for value in ticks(x_axis.low, x_axis.high, whole=True)
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{plot_right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + plot_right) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(_side_name(y_label, 12))
    return "".join(parts)


def _right_axis(axis: _Axis, plot_right: float, label: str, colour: int) -> str:
    parts = [
        f'<text class="ink{colour}" x="{plot_right + 7}" y="{axis(value) + 3.5:.1f}">{number(value)}</text>'
        for value in ticks(axis.low, axis.high)
    ]
    if label:
        parts.append(_side_name(label, WIDTH - 5))
    return "".join(parts)


def _side_name(label: str, x: float) -> str:
    y = (TOP + HEIGHT - BOTTOM) / 2
    place = f'transform="translate({x} {y}) rotate(-90)" text-anchor="middle"'
    return f'<text class="name" {place}>{escape(label)}</text>'


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    pixels = [(x_axis(x), y_axis(y)) for x, y in line.points]
    classes = f"line ink{line.colour}" + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    parts = []
    if line.band is not None:
        edges = list(zip(pixels, line.band, strict=True))
        upper = [(x, y_axis(high)) for (x, _), (_, high) in edges]
        lower = [(x, y_axis(low)) for (x, _), (low, _) in edges]
        parts.append(f'<polygon class="band fill{line.colour}" points="{_pairs(upper + lower[::-1])}"/>')
    parts.append(f'<polyline class="{classes}" points="{_pairs(pixels)}"/>')
    if len(pixels) <= 12 and not line.faint:
        for (x, y), (step, value) in zip(pixels, line.points, strict=True):
            tip = f"{line.label or 'value'} {value:.4g} at {step:g}"
            parts.append(
                f'<circle class="dot fill{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(tip)}</title></circle>"
            )
    return "".join(parts)


def _pairs(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _legend_entry(line: Line) -> str:
    classes = f"key ink{line.colour}" + (" dashed" if line.dashed else "") + (" faint" if line.faint else "")
    return f'<span><i class="{classes}"></i>{escape(line.label)}</span>'


def number(value: float) -> str:
    """A tick's number, short: 0, 0.05, 1500 as "1.5k", 2e-06."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", MINUS)
