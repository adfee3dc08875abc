from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.colors import to_hex

from sqdf_fast.display.plots import PALETTE, Chart
from sqdf_fast.display.tradeoffs import Series, pareto_front, tradeoff_chart


def test_the_front_is_what_nothing_beats():
    points = [(0.0, 5.0), (1.0, 4.0), (1.0, 3.0), (2.0, 4.0), (3.0, 1.0), (2.5, 0.0)]
    assert pareto_front(points) == [(3.0, 1.0), (2.0, 4.0), (0.0, 5.0)]
    assert pareto_front(points, (-1, 1)) == [(0.0, 5.0)]
    assert pareto_front(points, (1, -1)) == [(3.0, 1.0), (2.5, 0.0)]


def legend(chart: Chart) -> list[str]:
    return [text.get_text() for found in chart.figure.legends for text in found.get_texts()]


def test_curves_have_their_names_in_their_colors_which_do_not_cover_each_other():
    names = [f"method-{i}" for i in range(12)]
    chart = tradeoff_chart("t", "x", "y", [Series(n, [(0, 0.0), (1, 1 + i / 100)], i) for i, n in enumerate(names)])
    assert legend(chart) == names
    chart.svg()
    texts = chart.figure.legends[0].get_texts()
    assert [to_hex(text.get_color()) for text in texts] == [PALETTE[f"c{i}"][0] for i in range(1, 13)]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    whole, plot = chart.figure.bbox, chart.axes.bbox
    assert all((whole.min <= box.min).all() and (box.max <= whole.max).all() for box in boxes)
    assert not any(box.overlaps(plot) for box in boxes)
    assert not tradeoff_chart("title", "x", "y", []).axes.lines


def test_a_curve_that_collapses_leaves_the_plot_to_the_others():
    calm = [Series(f"calm-{i}", [(0, 0.0), (1 + i, 2 - 0.5 * i)], i) for i in range(2)]
    falling = Series("fall-1", [(0, 0.0), (1, 2.0), (2, -8.0), (3, -9.0)], 2)
    chart = tradeoff_chart("title", "x", "y", [*calm, falling])
    bottom, top = chart.axes.get_ylim()
    assert (bottom, top) == (0, pytest.approx(2.12))
    marks = [
        tuple(map(float, line.get_xydata()[0])) for line in chart.axes.lines
        if len(line.get_xdata()) == 1 and to_hex(line.get_color()) == PALETTE["c3"][0]
    ]  # fmt: skip
    # Its points within the plot, and where it leaves.
    assert marks == [(0, 0), (1, 2), (pytest.approx(1.2), 0)]
    (front,) = [line for line in chart.axes.lines if line.get_linewidth() == 7]
    assert (front.get_ydata() >= bottom).all()
    assert "<title>fall-1: x 3, y -9</title>" in chart.svg()
    assert legend(chart) == ["calm-0", "calm-1", "fall-1, ends at \u22129"]
    # Two such curves are no exception, of two curves none is, and none that is good.
    second = Series("falling", falling.points, 3)
    for series, better in (
        ([*calm, falling, second], 1),
        ([calm[0], falling], 1),
        ([*calm, falling], -1),
        ([*calm, falling], 0),
    ):
        assert not [
            name for name in legend(tradeoff_chart("t", "x", "y", series, better=(1, better))) if "ends" in name
        ]
