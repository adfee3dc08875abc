from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from sqdf_fast.display import before_after_grid, image_grid, save_png
from sqdf_fast.display.grid import GAP, PAPER, _wrap
from sqdf_fast.errors import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def centres(sheet: Image.Image, tile: int, places: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    return [sheet.getpixel((left + tile // 2, top + tile // 2)) for left, top in places]


def test_pictures_are_in_reading_order():
    sheet = image_grid([flat(RED), flat(GREEN), flat(BLUE)], ["a", "b", "c"], columns=2, tile=80)
    column = 80 + GAP
    row = (sheet.height - GAP) // 2
    assert sheet.width == 2 * column + GAP
    assert centres(sheet, 80, [(GAP, GAP), (GAP + column, GAP), (GAP, GAP + row)]) == [RED, GREEN, BLUE]
    assert sheet.getpixel((GAP + column + 40, GAP + row + 40)) == PAPER


def test_label_is_drawn_under_its_picture():
    with_label = np.asarray(image_grid([flat(RED)], ["word"], tile=80))
    without = np.asarray(image_grid([flat(RED)], [""], tile=80))
    assert with_label.shape == without.shape
    rows = np.flatnonzero((with_label != without).any(axis=(1, 2)))
    assert rows.min() > GAP + 80


def test_long_label_wraps_and_makes_room():
    short = image_grid([flat(RED), flat(RED)], ["a", "b"], tile=80)
    long = image_grid([flat(RED), flat(RED)], ["a", "a prompt with very many words in it, " * 3], tile=80)
    assert long.width == short.width
    assert long.height > short.height + 4 * 14


def test_wrap_keeps_every_word_and_the_width():
    font = ImageFont.load_default(size=14)
    text = "an exceedingly Donaudampfschifffahrtsgesellschaftskapitaensmuetze on a mat"
    lines = _wrap(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrap("", font, 120) == [""]


def test_pairs_stand_side_by_side_under_their_headings():
    sheet = before_after_grid([flat(RED), flat(RED)], [flat(GREEN), flat(BLUE)], ["a", "b"], columns=2, tile=100)
    below_heading = next(y for y in range(sheet.height) if sheet.getpixel((GAP + 50, y)) == RED)
    places = [(GAP + x, below_heading) for x in (0, 104, 204 + GAP, 308 + GAP)]
    assert centres(sheet, 100, places) == [RED, GREEN, RED, BLUE]
    heading = np.asarray(sheet)[:below_heading]
    assert (heading != PAPER).any()


def test_other_shapes_keep_their_proportions():
    sheet = np.asarray(image_grid([flat(RED, (200, 100))], [""], tile=80))
    red = (sheet == RED).all(axis=2)
    assert red.any(axis=1).sum() == 40
    assert red.any(axis=0).sum() == 80


def test_unequal_numbers_are_refused():
    with pytest.raises(UserError, match="2 pictures, 1 labels"):
        image_grid([flat(RED), flat(RED)], ["a"])
    with pytest.raises(UserError, match="1, 2 and 1 given"):
        before_after_grid([flat(RED)], [flat(RED), flat(RED)], ["a"])
    with pytest.raises(UserError, match="0 pictures"):
        image_grid([], [])


def test_save(tmp_path):
    save_png(flat(RED), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == RED
    with pytest.raises(UserError, match="cannot be written"):
        save_png(flat(RED), tmp_path / "gone" / "a.png")
