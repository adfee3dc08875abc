from __future__ import annotations

import pytest
from PIL import Image

from sqdf_fast.display.pages import environment, image_uri, render_page


def figures(heads, rows, differences=False, total=False) -> str:
    return str(environment().get_template("macros.html").module.figures(heads, rows, differences, total))


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
    assert shown in figures(["", "score"], [["one", cell]])


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
    assert ("<b>" in figures(["", "score"], [["one", cell]], differences=True)) == clear
    assert "<b>" not in figures(["", "score"], [["one", cell]])


def test_the_last_cell_of_a_short_row_takes_what_is_left():
    page = figures(["", "a", "b", "c"], [["one", "1", "2", "3"], ["two", "4", "never reached"], ["three"]])
    assert '<td colspan="2">never reached</td>' in page
    assert page.count("colspan") == 1


def test_every_value_of_a_page_is_escaped(tmp_path):
    template = tmp_path / "own.html"
    template.write_text(
        '{% extends "page.html" %}{% from "macros.html" import film, image, settings, tile %}{% block content %}'
        "{{ tile(x, x, x) }}{{ settings({x: x}, x) }}{{ film([x], [(x, [none])]) }}{{ image(none, x) }}{{ x }}"
        "{% endblock %}"
    )
    page = render_page(template, title="<script>alert(1)</script>", origin="<script>", x='<script>"x"')
    assert "<script>" not in page
    # Title and heading; footer; the rest in the content.
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert page.count("&lt;script&gt;") == 3 + 3 + 3 + 2 + 1


def test_settings_read_as_words():
    setting = environment().filters["setting"]
    assert [setting(value) for value in (None, True, False, ["a", None, 2], 0.5)] == [
        "none",
        "on",
        "off",
        "a, none, 2",
        "0.5",
    ]


def test_an_image_is_embedded_scaled_down_or_missing(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "small.png")
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "small.png").read_bytes()[:40])
    assert image_uri(tmp_path / "small.png").startswith("data:image/png;base64,")
    assert image_uri(tmp_path / "large.png").startswith("data:image/jpeg;base64,")
    assert image_uri(Image.new("RGB", (8, 8))).startswith("data:image/png;base64,")
    assert [image_uri(path) for path in (None, tmp_path / "gone.png", tmp_path / "cut.png")] == [None] * 3
