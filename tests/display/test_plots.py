from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from sqdf_fast.display.plots import (
    PALETTE,
    Bars,
    Chart,
    Line,
    bar_chart,
    dark_css,
    line_chart,
    moving_average,
)
from sqdf_fast.display.tradeoffs import Series, tradeoff_chart
from sqdf_fast.errors import UserError


def curves(chart: Chart) -> list[tuple[str, list[tuple[float, float]]]]:
    """Label and points of every line of more than one point, on all axes."""
    lines = [line for axes in chart.figure.axes for line in axes.lines if len(line.get_xdata()) > 1]
    return [(str(line.get_label()), [(float(x), float(y)) for x, y in line.get_xydata()]) for line in lines]


def tips(chart: Chart) -> list[str]:
    return re.findall(r"<g><title>(.*?)</title>", chart.svg())


def legend(chart: Chart) -> list[str]:
    return [text.get_text() for found in chart.figure.legends for text in found.get_texts()]


def test_steps_have_whole_ticks():
    chart = line_chart("t", [Line("", [(1, 3.0), (2, 1.0), (3, 2.0)])])
    assert list(chart.axes.get_xticks()) == [1, 2, 3]
    assert [x for x in line_chart("t", [Line("", [(0, 1), (120, 2)])]).axes.get_xticks() if x % 20] == []


def test_moving_average_is_centred():
    assert moving_average([(1, 3.0), (2, 6.0), (3, 9.0), (4, 0.0)], 3) == [(1, 4.5), (2, 6.0), (3, 5.0), (4, 4.5)]
    assert moving_average([(5, 2.0)], 7) == [(5, 2.0)]
    assert moving_average([], 7) == []


def test_curve_spans_the_plot():
    chart = line_chart("reward", [Line("a", [(0, 0.0), (5, 2.0), (10, 1.0)])])
    assert curves(chart) == [("a", [(0, 0), (5, 2), (10, 1)])]
    assert chart.axes.get_xlim() == (0, 10)
    bottom, top = chart.axes.get_ylim()
    assert (bottom, chart.title) == (0, "reward")
    assert top == pytest.approx(2.12)
    assert tips(chart) == ["a 0 at 0", "a 2 at 5", "a 1 at 10"]
    assert (chart.axes.get_xlabel(), legend(chart)) == ("step", ["a"])


def test_many_points_have_no_marks_and_faint_ones_neither():
    assert tips(line_chart("t", [Line("", [(x, x) for x in range(13)])])) == []
    assert tips(line_chart("t", [Line("", [(0, 1), (1, 2)], faint=True)])) == []


def test_band_surrounds_its_curve():
    chart = line_chart("r", [Line("a", [(0, 1.0), (1, 2.0)], band=[(0.5, 1.5), (1.0, 4.0)])])
    (band,) = chart.axes.collections
    corners = {tuple(map(float, vertex)) for vertex in band.get_paths()[0].vertices}
    assert corners == {(0, 0.5), (0, 1.5), (1, 1.0), (1, 4.0)}
    assert chart.axes.get_ylim()[1] > 4


def test_right_axis_has_its_own_scale():
    lines = [Line("a", [(0, 0.0), (1, 1.0)]), Line("b", [(0, 100.0), (1, 500.0)], 2, right=True)]
    chart = line_chart("both", lines, y_label="left", right_label="right")
    left, right = chart.figure.axes
    assert (left.get_ylim()[1] < 2, right.get_ylim()[0] > 50, right.get_ylim()[1] < 600) == (True, True, True)
    assert (left.get_ylabel(), right.get_ylabel(), legend(chart)) == ("left", "right", ["a", "b"])
    assert {to_hex(label.get_color()) for label in right.get_yticklabels()} == {PALETTE["c2"][0]}
    # Alone, a line of the right axis has the left one.
    assert len(line_chart("alone", lines[1:]).figure.axes) == 1


def test_nothing_to_draw():
    assert line_chart("empty", []) is None
    assert line_chart("empty", [Line("a", []), Line("b", [(0, float("nan"))])]) is None


def test_values_that_are_not_finite_are_left_out():
    band = [(0, 2), (0, 9e9), (2, 4)]
    chart = line_chart("r", [Line("", [(0, 1.0), (1, float("inf")), (2, 3.0)], band=band)])
    assert [points for _, points in curves(chart)] == [[(0, 1), (2, 3)]]
    assert chart.axes.get_ylim()[1] < 5


@pytest.mark.parametrize("points", [[(3, 0.0)], [(0, 5.0), (9, 5.0)], [(1, -1e-9)]])
def test_constant_and_single_values_lie_inside(points):
    axes = line_chart("r", [Line("", points)]).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(left <= x <= right and bottom < y < top for x, y in points)


def test_included_values_widen_the_axis():
    axes = line_chart("accuracy", [Line("", [(0, 0.93), (1, 0.9)])], include=(0, 1)).axes
    ticks = [round(tick, 9) for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    assert ticks == [0, 0.2, 0.4, 0.6, 0.8, 1]


@pytest.mark.parametrize(
    "chart",
    [
        line_chart('<b>&"', [Line('"x" <i> $\\frac$', [(0, 1.0)])], y_label="<y>"),
        bar_chart('<b>&"', ["<i>"], [Bars('"x" <i> $\\frac$', [1.0])], "<y>"),
        tradeoff_chart('<b>&"', "x", "<y>", [Series('"x" <i> $\\frac$', [(0, 1), (1, 2)], 0)]),
    ],
)
def test_text_is_escaped_and_a_dollar_is_a_dollar(chart):
    text = chart.svg()
    assert not any(tag in text for tag in ("<b>", "<i>", "<y>"))
    element = ElementTree.fromstring(text.replace("xlink:", ""))
    assert element.attrib["aria-label"] == '<b>&"'
    words = [node.text for node in element.iter("text")]
    assert {"<y>", '"x" <i> $\\frac$'} <= set(words)


def test_an_inline_plot_has_the_colors_of_its_page_and_no_address():
    text = line_chart("t", [Line("a", [(0, 1.0), (1, 2.0)], 3)]).svg()
    light, dark = PALETTE["c3"]
    assert f"stroke: {light}" in text
    assert f"fill: {PALETTE['soft'][0]}" in text
    assert f'[style*="stroke: {light}"]{{stroke:{dark}!important}}' in dark_css()
    # References are to the plot's own parts: markers and the clipped area.
    assert not re.search(r"url\((?!#p)|https?://", text)
    assert set(re.findall(r' id="(.)', text)) == {"m", "p"}
    assert text.startswith('<svg viewBox="0 0 420 250"')


def bars(chart: Chart) -> list[list[float]]:
    return [[bar.get_width() for bar in group] for group in chart.axes.containers]


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("Peak", ["reward", "policy"], [Bars("planned", [4, 1], True), Bars("measured", [5, 2.5])], "GiB")
    planned, measured = chart.axes.containers
    assert bars(chart) == [[4, 1], [5, 2.5]]
    assert [bar.get_alpha() for bar in (*planned, *measured)] == [0.35, 0.35, 1, 1]
    assert [label.get_text() for label in chart.axes.get_yticklabels()] == ["reward", "policy"]
    assert sorted(text.get_text() for text in chart.axes.texts) == ["1", "2.5", "4", "5"]
    assert (chart.axes.get_xlabel(), legend(chart)) == ("GiB", ["planned", "measured"])
    # From the top, the rows in their order and the groups within each, none over another.
    rows = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in (*planned, *measured))
    assert all(rows[i][1] <= rows[i + 1][0] + 1e-9 for i in range(3))
    assert planned[0].get_y() < measured[0].get_y() < planned[1].get_y()
    assert chart.axes.yaxis_inverted()


def test_missing_values_leave_a_gap_and_an_empty_group_is_left_out():
    chart = bar_chart("t", ["a", "b"], [Bars("planned", [None, math.nan]), Bars("measured", [None, 2.0])], "s", 2)
    ((first, second),) = bars(chart)
    assert (math.isnan(first), second) == (True, 2)
    assert legend(chart) == ["measured"]
    assert [text.get_text() for text in chart.axes.texts if text.get_text()] == ["2"]


@pytest.mark.parametrize("values", [[None, None], [0.0, None], [math.inf, -1.0]])
def test_no_bars_to_draw(values):
    assert bar_chart("t", ["a", "b"], [Bars("x", values)], "s") is None


def test_a_plot_is_saved_with_its_title_in_both_formats(tmp_path):
    markers = [Series("", [], position).marker for position in range(7)]
    assert markers == ["o", "s", "^", "D", "v", "P", "o"]
    chart = tradeoff_chart("a < b", "x", "y", [Series("one", [(0, 0), (1, 1)], 0)], level=0.5)
    for kind in ("svg", "png"):
        chart.save(tmp_path / "plots" / f"one.{kind}")
    texts = [
        node.text for node in ElementTree.parse(tmp_path / "plots" / "one.svg").iter() if node.tag.endswith("text")
    ]
    assert {"a < b", "equal proxy reward", "one"} <= set(texts)
    # The file follows its reader's light or dark mode too.
    assert dark_css() in (tmp_path / "plots" / "one.svg").read_text(encoding="utf-8")
    image = Image.open(tmp_path / "plots" / "one.png").convert("RGB")
    assert image.size == (1120, 800)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    blue = tuple(int(PALETTE["c1"][0][k : k + 2], 16) for k in (1, 3, 5))
    assert (np.asarray(image) == blue).all(axis=2).sum() > 500
    # The page has the title beside the plot, not in it.
    assert "a &lt; b</text>" not in chart.svg()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/one\.png: cannot be written"):
        chart.save(tmp_path / "file" / "one.png")
