from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sqdf_fast.display.bars import NAME_WIDTH, RIGHT, Bars, bar_chart
from sqdf_fast.display.chart import WIDTH


def bars(chart: str) -> list[tuple[float, str, str]]:
    """Width, class and tip of every bar, from the top."""
    found = sorted(ElementTree.fromstring(chart).findall(".//rect"), key=lambda bar: float(bar.attrib["y"]))
    return [(float(bar.attrib["width"]), bar.attrib["class"], bar.find("title").text) for bar in found]


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("Peak", ["reward", "policy"], [Bars("planned", [4, 1], True), Bars("measured", [5, 2.5])], "GiB")
    full = WIDTH - RIGHT - NAME_WIDTH
    assert bars(chart) == [
        (pytest.approx(0.8 * full, abs=0.1), "bar fill1 faint", "reward, planned: 4 GiB"),
        (pytest.approx(full, abs=0.1), "bar fill1", "reward, measured: 5 GiB"),
        (pytest.approx(0.2 * full, abs=0.1), "bar fill1 faint", "policy, planned: 1 GiB"),
        (pytest.approx(0.5 * full, abs=0.1), "bar fill1", "policy, measured: 2.5 GiB"),
    ]
    texts = [text.text for text in ElementTree.fromstring(chart).findall(".//text")]
    assert texts == ["0", "1", "2", "3", "4", "5", "GiB", "reward", "4", "5", "policy", "1", "2.5"]


def test_bars_lie_inside_the_picture_one_below_another():
    figure = ElementTree.fromstring(bar_chart("t", ["a", "b", "c"], [Bars("x", [1, 2, 3]), Bars("y", [3, 2, 1])], "s"))
    height = float(figure.find("svg").attrib["viewBox"].split()[3])
    found = figure.findall(".//rect")
    spans = sorted((float(bar.attrib["y"]), float(bar.attrib["y"]) + float(bar.attrib["height"])) for bar in found)
    assert all(bottom <= top for (_, bottom), (top, _) in pairwise(spans))
    assert spans[0][0] >= 0
    assert spans[-1][1] <= height - 34
    axis = {(float(line.attrib["y1"]), float(line.attrib["y2"])) for line in figure.findall(".//line")}
    assert axis == {(6, height - 34)}


def test_missing_values_leave_a_gap_and_an_empty_group_is_left_out():
    chart = bar_chart("t", ["a", "b"], [Bars("planned", [None, float("nan")]), Bars("measured", [None, 2.0])], "s", 2)
    assert [(kind, tip) for _, kind, tip in bars(chart)] == [("bar fill2", "b, measured: 2 s")]
    assert "planned" not in chart


@pytest.mark.parametrize("values", [[None, None], [0.0, None], [float("inf"), -1.0]])
def test_nothing_to_draw(values):
    assert bar_chart("t", ["a", "b"], [Bars("x", values)], "s") == ""


def test_text_is_escaped():
    chart = bar_chart("<b>", ["<i>"], [Bars("<u>", [1.0])], "<s>")
    assert not any(tag in chart for tag in ("<b>", "<i>", "<u>", "<s>"))
    assert ElementTree.fromstring(chart).find("figcaption").text == "<b>"
