"""Pareto plots: one score against another or against cost, a curve a method, named where it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from sqdf_fast.compare.curves import COSTS, PROXY, Curve
from sqdf_fast.compare.drawing import SERIES, SHAPES, Drawing, Mark, Point, Stroke, Text
from sqdf_fast.compare.results import Results
from sqdf_fast.compare.table import label
from sqdf_fast.display.chart import number, ticks
from sqdf_fast.evaluate.judge import Better

WIDTH, HEIGHT = 560.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 20.0, 38.0, 48.0
NAMES = 130.0
LABEL_SIZE, LABEL_HEIGHT = 11.5, 14.0
# Mean width of a letter in the sizes used; a little wide, so that names keep clear of each other.
LETTER = 0.58
# Of a plot's axes; a judge that measures a property without a good side has no front.
SIGNS: dict[Better, int] = {"higher": 1, "lower": -1, "neither": 0}
# A plot that a single curve would make this many times as high goes without its far end.
FAR = 2.5
COST_LABELS = {"unet_evaluations": "UNet evaluations", "seconds": "training seconds", "reward_evaluations": "rewards"}


@dataclass(frozen=True)
class Series:
    """One method's mean over its seeds.

    Attributes:
        points: by evaluation; colour, shape: of its marks.
    """

    name: str
    points: list[Point]
    colour: str
    shape: str


@dataclass(frozen=True)
class Figure:
    """A plot and the name of its file."""

    name: str
    drawing: Drawing
    series: list[Series]


def figures(results: Results, group: str) -> list[Figure]:
    """The plots of a group: scores against proxy reward, reward against compute."""
    unplotted = (PROXY, "vendi", "vendi_all", "distance_to_base")
    axes = [(PROXY, score) for score in results.metrics if score not in unplotted]
    axes += [(cost, PROXY) for cost in ("unet_evaluations", "seconds")]
    if "true_reward" in results.metrics:
        axes.append(("unet_evaluations", "true_reward"))
    directions = _directions(results)
    found = [_figure(results, group, x, y, directions) for x, y in axes]
    return [figure for figure in found if figure.series]


def _directions(results: Results) -> dict[str, Better]:
    """Which direction of a cost or score is good, as far as it is known to be another than higher."""
    found: dict[str, Better] = dict.fromkeys(("kl", *COSTS), "lower")
    for run in results.runs:
        for curve in run.curves:
            found.update(curve.better)
    return found


def _figure(results: Results, group: str, x: str, y: str, directions: Mapping[str, Better]) -> Figure:
    names = [COST_LABELS.get(name, label(name)) for name in (x, y)]
    series = []
    for position, index in enumerate(results.of(group)):
        run = results.runs[index]
        # What a picture costs each time is nothing to set beside what training cost once.
        points = [] if run.free and x in COSTS else _mean_points(run.curves, x, y)
        if points:
            colour, shape = f"s{position % SERIES}", SHAPES[position % len(SHAPES)]
            series.append(Series(run.label, points, colour, shape))
    title = f"{names[1][0].upper()}{names[1][1:]} against {names[0]}"
    level = results.levels.get(group)
    better = (SIGNS[directions.get(x, "higher")], SIGNS[directions.get(y, "higher")])
    drawing = plot(title, names[0], names[1], series, level.value if level and x == PROXY else None, better)
    prefix = f"ablation_{group}" if group else "methods"
    return Figure(f"{prefix}_{y}_against_{x}", drawing, series)


def _mean_points(curves: Sequence[Curve], x: str, y: str) -> list[Point]:
    """Mean over seeds, evaluation by evaluation, as far as every seed came."""
    points = []
    for row in zip(*(curve.points for curve in curves), strict=False):
        pairs = [(point.cost.get(x, point.scores.get(x)), point.scores.get(y)) for point in row]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known and len(known) == len(pairs):
            points.append(_mean(known))
    return points


def _mean(pairs: Sequence[Point]) -> Point:
    array = np.asarray(pairs, dtype=np.float64).mean(axis=0)
    return float(array[0]), float(array[1])


def plot(
    title: str,
    x_name: str,
    y_name: str,
    series: Sequence[Series],
    level: float | None = None,
    better: tuple[int, int] = (1, 1),
) -> Drawing:
    """Curves with a mark at each evaluation and their name at the end, over the front of what is not dominated.

    A curve that collapses leaves the plot, so that the others can be told apart: it has its large mark there, and the
    height of its end beside its name.

    Args:
        level: draws a vertical line there: the proxy reward at which methods are compared.
        better: of x and y, 1 where more is better, -1 where less is, 0 where neither is: then there is no front.
    """
    drawing = Drawing(WIDTH, HEIGHT, title)
    if not series:
        return drawing
    everything = [point for one in series for point in one.points]
    # Curves that all end at the same x have their names beside it.
    last = [one.points[-1][0] for one in series]
    together = len(series) > 1 and max(last) - min(last) < 0.2 * (max(last) - min(x for x, _ in everything))
    across = _Axis.over([x for x, _ in everything], LEFT, WIDTH - (NAMES if together else RIGHT))
    up = _Axis.over(_in_view(series, better[1]), HEIGHT - BOTTOM, TOP)
    _axes(drawing, across, up, x_name, y_name)
    if level is not None and across.low <= level <= across.high:
        drawing.add(
            Stroke([(across(level), TOP), (across(level), HEIGHT - BOTTOM)], "soft", 1, dashed=True, opacity=0.7),
            Text((across(level), TOP - 4), "equal proxy reward", "soft", 10, "middle"),
        )
    seen = [(x, y) for x, y in everything if up.low <= y <= up.high]
    front = [(across(x), up(y)) for x, y in pareto_front(seen, better)] if all(better) else []
    if len(front) > 1:
        drawing.add(Stroke(front, "soft", 7, opacity=0.18))
    taken: list[_Box] = []
    names: list[_Box] = []
    ends = []
    for one in series:
        pixels = [(across(x), up(y)) for x, y in one.points]
        pieces = _seen(pixels)
        for piece in pieces:
            drawing.add(Stroke(piece, one.colour, 1.8, opacity=0.85))
            taken += [_Box.around(between, 1.5) for between in _along(piece)]
        end, name = pixels[-1], one.name
        if not TOP <= end[1] <= HEIGHT - BOTTOM:
            end = pieces[-1][-1] if pieces else (end[0], min(max(end[1], TOP), HEIGHT - BOTTOM))
            name = f"{one.name}, ends at {number(one.points[-1][1])}"
        before = [
            (pixel, point, 2.6)
            for pixel, point in zip(pixels[:-1], one.points[:-1], strict=True)
            if TOP <= pixel[1] <= HEIGHT - BOTTOM
        ]
        for pixel, point, radius in [*before, (end, one.points[-1], 5.0)]:
            tip = f"{one.name}: {x_name} {point[0]:.4g}, {y_name} {point[1]:.4g}"
            drawing.add(Mark(pixel, one.colour, one.shape, radius, tip))
            taken.append(_Box.around(pixel, 3.5))
        ends.append((one, name, end))
    for one, name, end in ends:
        _name(drawing, name, one.colour, end, taken, names)
    return drawing


def _in_view(series: Sequence[Series], better: int) -> list[float]:
    """The heights that a plot has to show: all, or not those of a single curve that is far worse than the others."""
    heights = [[y for _, y in one.points] for one in series]
    everything = [y for one in heights for y in one]
    if len(series) < 3 or not better:
        return everything
    # What is better than all others is never left out.
    worst = max(min(better * y for other in heights if other is not one for y in other) for one in heights)
    shown = [y for y in everything if better * y >= worst]
    return shown if _length(everything) > FAR * _length(shown) > 0 else everything


def _length(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _seen(pixels: Sequence[Point]) -> list[list[Point]]:
    """The pieces of a curve that lie within the plot's height."""
    pieces: list[list[Point]] = []
    for (x0, y0), (x1, y1) in pairwise(pixels):
        cuts = [0.0, 1.0] if y0 == y1 else sorted((edge - y0) / (y1 - y0) for edge in (TOP, HEIGHT - BOTTOM))
        start, end = max(0.0, cuts[0]), min(1.0, cuts[1])
        if start >= end or not TOP <= y0 + (y1 - y0) * (start + end) / 2 <= HEIGHT - BOTTOM:
            continue
        first, last = ((x0 + (x1 - x0) * at, y0 + (y1 - y0) * at) for at in (start, end))
        if start == 0.0 and pieces and pieces[-1][-1] == (x0, y0):
            pieces[-1].append(last)
        else:
            pieces.append([first, last])
    return pieces


def pareto_front(points: Sequence[Point], better: tuple[int, int] = (1, 1)) -> list[Point]:
    """The points that no other one beats in both coordinates, from the best x to the worst."""
    front: list[Point] = []
    for point in sorted(set(points), key=lambda point: (-better[0] * point[0], -better[1] * point[1])):
        if not front or better[1] * point[1] > better[1] * front[-1][1]:
            front.append(point)
    return front


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.5 * max(abs(low), 1.0)
        # Quantities that cannot be negative keep their zero.
        return _Axis(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(drawing: Drawing, across: _Axis, up: _Axis, x_name: str, y_name: str) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in ticks(up.low, up.high):
        drawing.add(
            Stroke([(LEFT, up(value)), (right, up(value))], "grid"),
            Text((LEFT - 7, up(value) + 4), number(value), anchor="end"),
        )
    for value in ticks(across.low, across.high):
        drawing.add(
            Stroke([(across(value), bottom), (across(value), bottom + 4)], "rule"),
            Text((across(value), bottom + 17), number(value), anchor="middle"),
        )
    drawing.add(
        Stroke([(LEFT, bottom), (right, bottom)], "rule"),
        Text(((LEFT + right) / 2, HEIGHT - 10), x_name, size=12.5, anchor="middle"),
        Text((16, (TOP + bottom) / 2), y_name, size=12.5, anchor="middle", upwards=True),
    )


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    @staticmethod
    def around(at: Point, radius: float) -> _Box:
        return _Box(at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def _along(pixels: Sequence[Point], every: float = 8.0) -> Iterator[Point]:
    """Points along a curve, which names keep clear of."""
    for (x0, y0), (x1, y1) in pairwise(pixels):
        count = int(math.hypot(x1 - x0, y1 - y0) / every)
        for step in range(1, count + 1):
            yield x0 + (x1 - x0) * step / (count + 1), y0 + (y1 - y0) * step / (count + 1)


def _name(drawing: Drawing, name: str, colour: str, end: Point, taken: Sequence[_Box], names: list[_Box]) -> None:
    """Write a curve's name near its end, where it covers least; a thin line leads to it from afar."""
    width = LETTER * LABEL_SIZE * len(name)
    best, best_cost = None, math.inf
    for distance, turn in product((9, 18, 30, 46, 66, 90, 120, 150), range(16)):
        angle = 2 * math.pi * turn / 16
        x, y = end[0] + distance * math.cos(angle), end[1] + distance * math.sin(angle)
        left = x if math.cos(angle) > 0.3 else x - width if math.cos(angle) < -0.3 else x - width / 2
        box = _Box(left, y - LABEL_HEIGHT / 2, left + width, y + LABEL_HEIGHT / 2)
        outside = box.left < LEFT + 2 or box.right > WIDTH - 2 or box.top < TOP or box.bottom > HEIGHT - BOTTOM - 2
        # A name over a curve can be read, a name over a name cannot.
        covered = sum(box.overlap(other) for other in taken) + 100 * sum(box.overlap(other) for other in names)
        cost = covered + distance * 0.8 + (1e6 if outside else 0)
        if cost < best_cost:
            best, best_cost = (box, distance), cost
    assert best is not None
    box, distance = best
    if distance > 18:
        nearest = (min(max(end[0], box.left), box.right), min(max(end[1], box.top), box.bottom))
        drawing.add(Stroke([end, nearest], colour, 0.8, opacity=0.6))
    drawing.add(Text((box.left, box.bottom - 3.5), name, colour, LABEL_SIZE, bold=True))
    names.append(box)
