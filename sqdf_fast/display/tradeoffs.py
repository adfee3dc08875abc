"""Trade-off plots: one score against another or against cost, a curve a method, named where it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from sqdf_fast.display.plots import PALETTE, ROUND, STYLE, Chart, Point, add_mark, colour_of, make_figure
from sqdf_fast.display.units import MINUS

Array = NDArray[np.float64]

SERIES = 12
MARKERS = ("o", "s", "^", "D", "v", "P")
# Of a name from its curve's end, in points.
DISTANCES = (7, 18, 30, 46, 66, 90, 120, 150)
# A plot that a single curve would make this many times as high leaves out its far end.
FAR = 2.5


@dataclass(frozen=True)
class Series:
    """One method's curve, a point an evaluation; ``colour`` counts from 1, ``marker`` is matplotlib's."""

    name: str
    points: Sequence[Point]
    colour: int
    marker: str

    @staticmethod
    def of(name: str, points: Sequence[Point], position: int) -> Series:
        """With the colour and marker of the ``position``-th series, from 0."""
        return Series(name, points, position % SERIES + 1, MARKERS[position % len(MARKERS)])


def tradeoff_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    level: float | None = None,
    better: tuple[int, int] = (1, 1),
) -> Chart:
    """Curves with a mark at each evaluation and their name at the end, over the Pareto front of all points.

    A curve that collapses leaves the plot, so that the others stay distinct: its large mark is where it leaves, and
    its name says where it ends.

    Args:
        level: x of a vertical line: the proxy reward at which methods are compared.
        better: of x and y, 1 where more is better, -1 where less is, 0 where neither is: then there is no front.
    """
    with rc_context(STYLE):
        figure, axes = make_figure(560, 400)
        axes.set(xlabel=x_label, ylabel=y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
        if not series:
            return Chart(title, figure)
        points = [point for one in series for point in one.points]
        _limits(axes, series, in_view(series, better[1]))
        low, high = axes.get_ylim()
        if level is not None:
            axes.axvline(level, color=PALETTE["soft"][0], linewidth=1, linestyle="--", alpha=0.7)
            axes.text(level, 1, "equal proxy reward", fontsize=10, color=PALETTE["soft"][0], ha="center", va="bottom",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        front = pareto_front([point for point in points if low <= point[1] <= high], better) if all(better) else []
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=PALETTE["soft"][0], linewidth=7, alpha=0.18)
        ends = []
        for one in series:
            axes.plot(*zip(*one.points, strict=True), color=colour_of(one.colour), linewidth=1.8, label=one.name)
            end, name = _end(one, low, high)
            for point in [point for point in one.points[:-1] if low <= point[1] <= high]:
                add_mark(axes, point, _tip(one, point, x_label, y_label), colour_of(one.colour), 5.2, one.marker)
            tip = _tip(one, one.points[-1], x_label, y_label)
            add_mark(axes, end, tip, colour_of(one.colour), 9, one.marker, clip_on=False, zorder=3)
            ends.append((name, end, colour_of(one.colour)))
        _write_names(axes, ends)
    return Chart(title, figure)


def _tip(one: Series, point: Point, x_label: str, y_label: str) -> str:
    return f"{one.name}: {x_label} {point[0]:.4g}, {y_label} {point[1]:.4g}"


def _limits(axes: Axes, series: Sequence[Series], heights: Sequence[float]) -> None:
    across = [x for one in series for x, _ in one.points]
    last = [one.points[-1][0] for one in series]
    for values, limit in ((across, axes.set_xlim), (heights, axes.set_ylim)):
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.5 * max(abs(low), 1.0)
        limit(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    if len(series) > 1 and np.ptp(last) < 0.2 * (max(last) - min(across)):
        # Curves that all end at the same x have their names beside it.
        axes.set_xlim(right=max(last) + 0.3 * (max(last) - min(across)))


def in_view(series: Sequence[Series], better: int) -> list[float]:
    """The heights that a plot has to show: all, or not those of a single curve that is far worse than the others."""
    heights = [[y for _, y in one.points] for one in series]
    everything = [y for one in heights for y in one]
    if len(series) < 3 or not better:
        return everything
    # What is better than all others is never left out.
    worst = max(min(better * y for other in heights if other is not one for y in other) for one in heights)
    shown = [y for y in everything if better * y >= worst]
    return shown if np.ptp(everything) > FAR * np.ptp(shown) > 0 else everything


def _end(one: Series, low: float, high: float) -> tuple[Point, str]:
    """Where a curve's large mark is, its end or the last place where it leaves the plot, and its name there."""
    end = one.points[-1]
    if low <= end[1] <= high:
        return end, one.name
    edge = low if end[1] < low else high
    for (x0, y0), (x1, y1) in zip(one.points[-2::-1], one.points[:0:-1], strict=True):
        if (y0 - edge) * (y1 - edge) <= 0:
            end = (x0 + (x1 - x0) * (edge - y0) / (y1 - y0), edge)
            break
    return (end[0], edge), f"{one.name}, ends at {one.points[-1][1]:.4g}".replace("-", MINUS)


def pareto_front(points: Sequence[Point], better: tuple[int, int] = (1, 1)) -> list[Point]:
    """The points that no other one beats in both coordinates, from the best x to the worst."""
    front: list[Point] = []
    for point in sorted(set(points), key=lambda point: (-better[0] * point[0], -better[1] * point[1])):
        if not front or better[1] * point[1] > better[1] * front[-1][1]:
            front.append(point)
    return front


def _write_names(axes: Axes, ends: Sequence[tuple[str, Point, str]]) -> None:
    """Write each curve's name near its end, clear of other names and of curves; a thin line leads to it from afar."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    curves = np.concatenate([line.interpolated(20).vertices for line in lines])
    # A name may reach over the right edge, where curves end.
    page = Bbox([axes.bbox.min, (figure.bbox.xmax - 2, axes.bbox.ymax)])
    names: list[Bbox] = []
    for name, end, colour in ends:
        text = axes.annotate(name, end, (0, 0), textcoords="offset points", color=colour, fontweight="bold")
        text.set(in_layout=False, annotation_clip=False)
        origin, size = axes.transData.transform(end), np.array(text.get_window_extent().size)
        boxes = [_beside(origin, size, distance, turn) for distance, turn in product(DISTANCES, range(16))]
        best = min(boxes, key=lambda box: _cost(box, page, names, curves) + 0.8 * _distance(box, origin))
        names.append(best)
        text.set(position=best.min - origin)
        if _distance(best, origin) > 18:
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6}
            near = np.clip(origin, best.min, best.max) - origin
            line = axes.annotate("", end, near, textcoords="offset points", arrowprops=leader)
            line.set(in_layout=False, annotation_clip=False)


def _beside(origin: Array, size: Array, distance: float, turn: int) -> Bbox:
    """A box of ``size`` that begins ``distance`` from ``origin``, at ``turn`` sixteenths of a circle."""
    angle = 2 * math.pi * turn / 16
    way = np.array([math.cos(angle), math.sin(angle)])
    corner = origin + distance * way - size * np.where(way > 0.3, 0, np.where(way < -0.3, 1, 0.5))
    return Bbox([corner, corner + size])


def _distance(box: Bbox, origin: Array) -> float:
    return float(np.linalg.norm(np.clip(origin, box.min, box.max) - origin))


def _cost(box: Bbox, page: Bbox, names: Sequence[Bbox], curves: Array) -> float:
    # A name over a curve is readable, a name over a name is not.
    outside = bool(np.any(box.min < page.min) or np.any(box.max > page.max))
    return 1e6 * outside + 1e4 * box.count_overlaps(names) + 20.0 * box.count_contains(curves)
