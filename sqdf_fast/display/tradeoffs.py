"""Trade-off plots: one score against another or against cost, a curve per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sqdf_fast.display.plots import PALETTE, ROUND, STYLE, Chart, Point, add_mark, make_figure
from sqdf_fast.display.units import MINUS

SERIES = 12
MARKERS = ("o", "s", "^", "D", "v", "P")
# A plot leaves out the far end of a single curve that would make it more than this many times as high.
FAR = 2.5


@dataclass(frozen=True)
class Series:
    """One method's curve, a point per evaluation; its position, from 0, selects color and marker."""

    name: str
    points: Sequence[Point]
    position: int

    @property
    def color(self) -> str:
        return PALETTE[f"c{self.position % SERIES + 1}"][0]

    @property
    def marker(self) -> str:
        return MARKERS[self.position % len(MARKERS)]


def tradeoff_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    level: float | None = None,
    better: tuple[int, int] = (1, 1),
) -> Chart:
    """Curves with a mark at each evaluation, a large one at the end, over the Pareto front of all points.

    A curve that collapses leaves the plot to the others: its large mark is where it leaves, and the legend has its end.

    Args:
        level: proxy reward at which methods are compared, a vertical line.
        better: signs of the good directions of x and y; no front is drawn if one is 0.
    """
    with rc_context(STYLE):
        figure, axes = make_figure(560, 400)
        axes.set(xlabel=x_label, ylabel=y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
        if not series:
            return Chart(title, figure)
        points = [point for one in series for point in one.points]
        axes.set(xlim=_padded([x for x, _ in points]), ylim=_padded(in_view(series, better[1])))
        low, high = axes.get_ylim()
        soft = PALETTE["soft"][0]
        if level is not None:
            axes.axvline(level, color=soft, linewidth=1, linestyle="--", alpha=0.7)
            text = axes.annotate("equal proxy reward", (level, 1), xycoords=("data", "axes fraction"), color=soft)
            text.set(fontsize=10, horizontalalignment="center", verticalalignment="bottom")
        front = pareto_front([point for point in points if low <= point[1] <= high], better) if all(better) else []
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=soft, linewidth=7, alpha=0.18)
        for one in series:
            _draw(axes, one)
        longest = max(map(len, axes.get_legend_handles_labels()[1]))
        columns = max(1, min(len(series), int(560 // (40 + 7.5 * longest))))
        figure.legend(loc="outside lower left", ncols=columns, labelcolor="linecolor", handletextpad=0.3)
    return Chart(title, figure)


def _draw(axes: Axes, one: Series) -> None:
    low, high = axes.get_ylim()
    axes.plot(*zip(*one.points, strict=True), color=one.color, linewidth=1.8)
    *before, last = one.points
    end, name = _end(one, low, high)
    shown = [(point, point, 5.2) for point in before if low <= point[1] <= high]
    for place, point, size in [*shown, (end, last, 9)]:
        tip = f"{one.name}: {axes.get_xlabel()} {point[0]:.4g}, {axes.get_ylabel()} {point[1]:.4g}"
        label = name if point is last else ""
        add_mark(axes, place, tip, one.color, size, one.marker, clip_on=False, zorder=3, label=label)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5 * max(abs(low), 1.0)
    # No negative axis for quantities that are not negative.
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def in_view(series: Sequence[Series], better: int) -> list[float]:
    """All heights, or those without the far end of a single curve that is far worse than the others."""
    heights = [[y for _, y in one.points] for one in series]
    everything = [y for one in heights for y in one]
    if len(series) < 3 or not better:
        return everything
    # What is better than all others is never left out.
    worst = max(min(better * y for other in heights if other is not one for y in other) for one in heights)
    shown = [y for y in everything if better * y >= worst]
    return shown if np.ptp(everything) > FAR * np.ptp(shown) > 0 else everything


def _end(one: Series, low: float, high: float) -> tuple[Point, str]:
    """The position of a curve's large mark, its end or where it last leaves the plot, and its legend entry."""
    end = one.points[-1]
    if low <= end[1] <= high:
        return end, one.name
    edge = low if end[1] < low else high
    for (x0, y0), (x1, y1) in zip(one.points[-2::-1], one.points[:0:-1], strict=True):
        if (y0 - edge) * (y1 - edge) <= 0:
            end = (x0 + (x1 - x0) * (edge - y0) / (y1 - y0), edge)
            break
    value = f"{one.points[-1][1]:.4g}".replace("-", MINUS)
    return (end[0], edge), f"{one.name}, ends at {value}"


def pareto_front(points: Sequence[Point], better: tuple[int, int] = (1, 1)) -> list[Point]:
    """The points that no other one beats in both coordinates, from the best x to the worst."""
    front: list[Point] = []
    for point in sorted(set(points), key=lambda point: (-better[0] * point[0], -better[1] * point[1])):
        if not front or better[1] * point[1] > better[1] * front[-1][1]:
            front.append(point)
    return front
