"""Plots by matplotlib, inline in a page in its light or dark colors, or as SVG and PNG files."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from sqdf_fast.files import disk_errors

Point = tuple[float, float]

# Colors on light and on dark of twelve series, text, rules and background.
PALETTE = {
    "c1": ("#2457c5", "#7ba7f7"),
    "c2": ("#c2571a", "#f0995a"),
    "c3": ("#1f8a55", "#6cc896"),
    "c4": ("#8247b5", "#be93ea"),
    "c5": ("#c0342b", "#f08a7e"),
    "c6": ("#0b8799", "#4fc3d1"),
    "c7": ("#8a6d00", "#d9bd4a"),
    "c8": ("#c0398a", "#f07fc0"),
    "c9": ("#56636e", "#a9b4be"),
    "c10": ("#5f8a12", "#b4d465"),
    "c11": ("#7a4a2b", "#cf9f7c"),
    "c12": ("#3d3fa8", "#9a9ff5"),
    "text": ("#1d2129", "#e7e8ea"),
    "soft": ("#626a78", "#9aa2af"),
    "rule": ("#e2e0db", "#2f343d"),
    "grid": ("#eceae5", "#292d35"),
    "card": ("#ffffff", "#1c1f25"),
}
# Largest number of points that are marked on a line.
MARKED = 12
_TIP = "tip: "
ROUND = [1, 2, 5, 10]
STYLE: Any = rc_params_from_file(Path(__file__).parent / "templates" / "plots.mplstyle", use_default_template=False)


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: legend entry, if any.
        points: (x, y) in order of x.
        color: number from 1 to 12 in the palette.
        band: (low, high) around each point.
        faint: thin and pale, for raw values under a smoothed curve.
        dashed: style of baselines.
        right: whether the curve has an axis of its own on the right.
    """

    label: str
    points: Sequence[Point]
    color: int = 1
    band: Sequence[Point] | None = None
    faint: bool = False
    dashed: bool = False
    right: bool = False

    def finite(self) -> Line:
        """Without the points that are not finite."""
        kept = [index for index, point in enumerate(self.points) if all(map(math.isfinite, point))]
        band = None if self.band is None else [self.band[index] for index in kept]
        return replace(self, points=[self.points[index] for index in kept], band=band)

    @property
    def hex(self) -> str:
        return PALETTE[f"c{self.color}"][0]


@dataclass(frozen=True)
class Bars:
    """One value per name, in their order, None if unknown; faint bars are pale, for planned values."""

    label: str
    values: Sequence[float | None]
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure and its title, the caption on a page and the heading in a file."""

    title: str
    figure: Figure

    @property
    def axes(self) -> Axes:
        return self.figure.axes[0]

    def svg(self) -> str:
        """An ``<svg>`` element for a page that has :func:`dark_css`."""
        text = self._saved("svg").decode().partition("<svg")[2].partition(">")[2]
        text = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", text)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = text.replace("font-family: 'DejaVu Sans', sans-serif", "font-family: inherit")
        width, height = (f"{72 * side:g}" for side in self.figure.get_size_inches())
        return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self.title)}">{text}'

    def save(self, path: Path) -> None:
        """Write the titled plot as SVG or PNG, by the suffix; the SVG has a dark mode. Raises UserError."""
        with rc_context(STYLE):
            self.axes.set_title(self.title)
        content = self._saved(path.suffix[1:], facecolor=PALETTE["card"][0])
        if path.suffix == ".svg":
            content = content.replace(b"</defs>", f"<style>{dark_css()}</style></defs>".encode(), 1)
        self.axes.set_title("", loc="left")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _saved(self, kind: str, facecolor: str = "none") -> bytes:
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {}
        with rc_context(STYLE), warnings.catch_warnings():
            # A browser has fonts for the scripts that the bundled one lacks.
            warnings.filterwarnings("ignore", message="Glyph")
            self.figure.savefig(buffer, format=kind, dpi=144, facecolor=facecolor, metadata=metadata)
        return buffer.getvalue()


def dark_css() -> str:
    """Rules that turn plots dark for readers who prefer it."""
    rules = (
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in PALETTE.values()
        for kind in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme:dark){{{''.join(rules)}}}"


def make_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` by ``height`` points with one axes."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "step",
    y_label: str = "",
    right_label: str = "",
    include: Sequence[float] = (),
) -> Chart | None:
    """Curves over steps or indices, without values that are not finite; None when no line has a point.

    Args:
        include: values that the left axis must reach, such as 0 to compare fractions.
    """
    lines = [line.finite() for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    with rc_context(STYLE):
        figure, left = make_figure(420, 250)
        right = left.twinx() if len({line.right for line in lines}) == 2 else left
        for line in lines:
            _draw(right if line.right else left, line)
        left.set(xlabel=x_label, ylabel=y_label)
        left.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND, integer=True))
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        left.update_datalim([(lines[0].points[0][0], value) for value in include])
        for axes in {left, right}:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
            _fit(axes)
        if right is not left:
            color = next(line.hex for line in lines if line.right)
            right.set_ylabel(right_label)
            right.tick_params(axis="y", labelcolor=color)
            right.grid(visible=False)
        _legend(figure)
    return Chart(title, figure)


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centered mean of ``window`` (odd) neighbors, fewer at the ends."""
    if not points:
        return []
    ones, values = np.ones(window), np.array([y for _, y in points], dtype=np.float64)
    edge = window // 2
    sums, counts = (np.convolve(row, ones)[edge : edge + len(points)] for row in (values, np.ones(len(points))))
    return [(x, float(mean)) for (x, _), mean in zip(points, sums / counts, strict=True)]


def _draw(axes: Axes, line: Line) -> None:
    color, (x, y) = line.hex, zip(*line.points, strict=True)
    if line.band is not None:
        low, high = zip(*line.band, strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0, clip_on=False)
    style: dict[str, Any] = {"linewidth": 1, "alpha": 0.4} if line.faint else {"linewidth": 2}
    axes.plot(x, y, "--" if line.dashed else "-", color=color, label=line.label, clip_on=False, **style)
    if len(line.points) <= MARKED and not line.faint:
        for point in line.points:
            add_mark(axes, point, f"{line.label or 'value'} {point[1]:.4g} at {point[0]:g}", color, 6, clip_on=False)


def add_mark(axes: Axes, point: Point, tip: str, color: str, size: float, marker: str = "o", **style: Any) -> None:
    """A marker that says ``tip`` under a mouse."""
    axes.plot(*point, marker, color=color, markersize=size, markeredgewidth=0, gid=_TIP + tip, **style)


def _fit(axes: Axes) -> None:
    """Fit the axes to the data, without negative values if the data has none."""
    axes.margins(x=0, y=0.06)
    axes.autoscale_view()
    bottom, top = axes.dataLim.intervaly
    if 0 <= bottom < top:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))


def _legend(figure: Figure) -> None:
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    shown = {label: handle for found in pairs for handle, label in found if label}
    if shown:
        columns = 1 if sum(map(len, shown)) + 6 * len(shown) > 72 else len(shown)
        figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=columns, handlelength=1.6)


def bar_chart(title: str, names: Sequence[str], groups: Sequence[Bars], unit: str, color: int = 1) -> Chart | None:
    """Horizontal bars; None when no value is above 0.

    Args:
        names: names of the rows, from the top.
        groups: bars of each row, from its top; groups without any value are left out.
        unit: label of the axis.
    """
    lengths = [np.array(group.values, dtype=np.float64) for group in groups]
    lengths = [np.where(np.isfinite(values) & (values >= 0), values, math.nan) for values in lengths]
    shown = [(group, values) for group, values in zip(groups, lengths, strict=True) if not np.isnan(values).all()]
    if not any(np.nanmax(values) > 0 for _, values in shown):
        return None
    with rc_context(STYLE):
        figure, axes = make_figure(420, 40 + 24 + (9 + 14 * len(shown)) * len(names))
        height = 0.8 / len(shown)
        for place, (group, values) in enumerate(shown):
            rows = np.arange(len(names)) + (place - (len(shown) - 1) / 2) * height
            alpha = 0.35 if group.faint else 1.0
            bars = axes.barh(rows, values, height, color=PALETTE[f"c{color}"][0], alpha=alpha, label=group.label)
            axes.bar_label(bars, fmt="%.3g", padding=4, color=PALETTE["soft"][0])
        axes.set(xlabel=unit, yticks=range(len(names)), yticklabels=names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        _legend(figure)
    return Chart(title, figure)
