from __future__ import annotations

import pytest

from sqdf_fast.display.elements import figure_table


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("1,200", '<td class="figure">1,200</td>'),
        ("-0.5 [-1.0, -0.1]", '<td class="figure">\u22120.5<small>\u22121.0 to \u22120.1</small></td>'),
        ("2 of [1, many]", '<td class="figure">2 of [1, many]</td>'),
        ("a <remark>", "<td>a &lt;remark&gt;</td>"),
        # Of a figure that is missing.
        ("-", '<td class="figure">\u2212</td>'),
    ],
)
def test_cells_are_figures_intervals_or_remarks(cell, shown):
    assert shown in figure_table(["", "score"], [["one", cell]])


@pytest.mark.parametrize(
    ("cell", "clear"),
    [
        ("+0.5 [+0.1, +0.9]", True),
        ("-0.5 [-0.9, -0.1]", True),
        ("+0.5 [-0.1, +0.9]", False),
        ("-0.5 [-0.9, +0.1]", False),
        ("+0.5 [+0.000, +0.9]", False),
        ("-0.5 [-0.9, +0.000]", False),
        ("+0.5", False),
    ],
)
def test_differences_that_are_clear_stand_out(cell, clear):
    assert ("<b>" in figure_table(["", "score"], [["one", cell]], differences=True)) == clear
    assert "<b>" not in figure_table(["", "score"], [["one", cell]])


def test_the_last_cell_of_a_short_row_takes_what_is_left():
    page = figure_table(["", "a", "b", "c"], [["one", "1", "2", "3"], ["two", "4", "never reached"], ["three"]])
    assert '<td colspan="2">never reached</td>' in page
    assert page.count("colspan") == 1
