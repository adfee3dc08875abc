from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from sqdf_fast.display.chart import BOTTOM, HEIGHT, LEFT, TOP, Line, line_chart, moving_average, number, ticks


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 9, [-2, 0, 2, 4, 6, 8]),
        (0.0012, 0.0018, [0.0012, 0.0013, 0.0014, 0.0015, 0.0016, 0.0017, 0.0018]),
        (0, 120, [0, 20, 40, 60, 80, 100, 120]),
        (7, 950, [200, 400, 600, 800]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole():
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(0.5, 1.5, whole=True) == [1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-15, "0"), (0.05, "0.05"), (-1.5, "\u22121.5"), (1500, "1.5k"), (2e-6, "2e-06")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_moving_average_is_centred():
    assert moving_average([(1, 3.0), (2, 6.0), (3, 9.0), (4, 0.0)], 3) == [
        (1, 4.5),
        (2, 6.0),
        (3, 5.0),
        (4, 4.5),
    ]
    assert moving_average([(5, 2.0)], 7) == [(5, 2.0)]


def test_curve_spans_the_plot_and_rises_upwards():
    figure = parsed(line_chart("reward", [Line("a", [(0, 0.0), (5, 2.0), (10, 1.0)])]))
    curve = points(figure.find(".//polyline"))
    assert curve[0][0] == LEFT
    assert curve[1][0] == pytest.approx((curve[0][0] + curve[2][0]) / 2, abs=0.1)
    assert curve[0][1] == HEIGHT - BOTTOM
    assert curve[1][1] < curve[2][1] < curve[0][1]
    assert curve[1][1] > TOP
    assert len(figure.findall(".//circle")) == 3
    assert figure.find("figcaption").text == "reward"


def test_band_surrounds_its_curve():
    figure = parsed(line_chart("r", [Line("a", [(0, 1.0), (1, 2.0)], band=[(0.5, 1.5), (1.0, 4.0)])]))
    curve, area = points(figure.find(".//polyline")), points(figure.find(".//polygon"))
    assert [x for x, _ in area] == [curve[0][0], curve[1][0], curve[1][0], curve[0][0]]
    assert area[0][1] < curve[0][1] < area[3][1]
    assert curve[0][1] - area[0][1] == pytest.approx(area[3][1] - curve[0][1], abs=0.11)


def test_right_axis_has_its_own_scale():
    chart = line_chart("both", [Line("a", [(0, 0.0), (1, 1.0)]), Line("b", [(0, 100.0), (1, 500.0)], 2, right=True)])
    first, second = (points(curve) for curve in parsed(chart).findall(".//polyline"))
    assert second[1][1] == pytest.approx(first[1][1], abs=8)
    labels = re.findall(r'class="ink2"[^>]*>([^<]+)<', chart)
    assert labels == ["100", "200", "300", "400", "500"]


def test_nothing_to_draw():
    assert line_chart("empty", []) == ""
    assert line_chart("empty", [Line("a", []), Line("b", [(0, float("nan"))])]) == ""


def test_not_finite_values_are_left_out():
    figure = parsed(
        line_chart("r", [Line("", [(0, 1.0), (1, float("inf")), (2, 3.0)], band=[(0, 2), (0, 9e9), (2, 4)])])
    )
    assert len(points(figure.find(".//polyline"))) == 2
    assert len(points(figure.find(".//polygon"))) == 4


def test_constant_and_single_values_are_drawn():
    for values in ([(3, 0.0)], [(0, 5.0), (9, 5.0)], [(1, -1e-9)]):
        for x, y in points(parsed(line_chart("r", [Line("", values)])).find(".//polyline")):
            assert x >= LEFT
            assert y > TOP
            assert y < HEIGHT - BOTTOM


def test_included_values_widen_the_axis():
    chart = line_chart("accuracy", [Line("", [(0, 0.93), (1, 0.9)])], include=(0, 1))
    labels = re.findall(r'text-anchor="end">([^<]+)<', chart)
    assert labels == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_text_is_escaped():
    chart = line_chart("<b>&", [Line('"x" <i>', [(0, 1.0)])], y_label="<y>")
    assert "<b>" not in chart
    assert "<i>" not in chart
    assert parsed(chart).find("figcaption").text == "<b>&"
