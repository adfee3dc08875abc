from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from sqdf_fast.display import image_grid, save_png
from sqdf_fast.display.grid import GAP, NAME_WIDTH, PAPER, _wrap
from sqdf_fast.errors import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
LEFT = NAME_WIDTH + GAP


def flat(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def centres(sheet: Image.Image, tile: int, places: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    return [sheet.getpixel((left + tile // 2, top + tile // 2)) for left, top in places]


def test_images_are_in_their_rows_and_columns():
    sheet = image_grid([[flat(RED), flat(GREEN)], [flat(BLUE), None]], ["a", "b"], tile=80)
    step, top = 80 + GAP, 2 * GAP
    assert sheet.size == (LEFT + 2 * step, top + 2 * step)
    places = [(LEFT, top), (LEFT + step, top), (LEFT, top + step), (LEFT + step, top + step)]
    assert centres(sheet, 80, places) == [RED, GREEN, BLUE, PAPER]
    assert sheet.getpixel((LEFT + 80 + GAP // 2, top + 40)) == PAPER


def test_a_rows_name_is_left_of_it_and_a_columns_name_above():
    sheets = [image_grid([[flat(RED)]], [row], [column], tile=80) for row in ("", "word") for column in ("", "word")]
    plain, column, row, _ = map(np.asarray, sheets)
    assert len({sheet.size for sheet in sheets}) == 1
    rows, columns = np.nonzero((plain != column).any(axis=2))
    assert rows.max() < sheets[0].height - 80 - GAP
    assert columns.min() >= LEFT
    rows, columns = np.nonzero((plain != row).any(axis=2))
    assert columns.max() < NAME_WIDTH
    # Beside the middle of its image.
    assert abs((rows.min() + rows.max()) / 2 - (sheets[0].height - GAP - 40)) < 8


def test_long_names_wrap_and_make_room():
    long = "a prompt with very many words in it, " * 6
    short = image_grid([[flat(RED), flat(RED)]], ["a"], ["b", "c"], tile=80)
    high_row = image_grid([[flat(RED), flat(RED)]], [long], ["b", "c"], tile=80)
    high_head = image_grid([[flat(RED), flat(RED)]], ["a"], ["b", long], tile=80)
    assert short.width == high_row.width == high_head.width
    assert high_row.height > short.height + 40
    assert high_head.height > short.height + 4 * 14


def test_wrap_keeps_every_word_and_the_width():
    font = ImageFont.load_default(size=14)
    text = "an exceedingly Donaudampfschifffahrtsgesellschaftskapitaensmuetze on a mat"
    lines = _wrap(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrap("", font, 120) == [""]


def test_pairs_stand_one_above_the_other():
    sheet = image_grid([[flat(RED), flat(RED)], [flat(GREEN), flat(BLUE)]], ["before", "after"], ["a", "b"], tile=100)
    below_heads = next(y for y in range(sheet.height) if sheet.getpixel((LEFT + 50, y)) == RED)
    step = 100 + GAP
    places = [(LEFT + x, below_heads + y) for x, y in ((0, 0), (0, step), (step, 0), (step, step))]
    assert centres(sheet, 100, places) == [RED, GREEN, RED, BLUE]
    assert (np.asarray(sheet)[:below_heads] != PAPER).any()


def test_other_shapes_keep_their_proportions():
    sheet = np.asarray(image_grid([[flat(RED, (200, 100))]], [""], tile=80))
    red = (sheet == RED).all(axis=2)
    assert red.any(axis=1).sum() == 40
    assert red.any(axis=0).sum() == 80


@pytest.mark.parametrize(
    ("images", "rows", "columns", "said"),
    [
        ([[flat(RED)], [flat(RED)]], ["a"], [], r"2 rows of \[1\] images with 1 and 0 labels"),
        ([[flat(RED)], [flat(RED), flat(RED)]], ["a", "b"], [], r"2 rows of \[1, 2\] images"),
        ([[flat(RED)]], ["a"], ["b", "c"], r"1 rows of \[1\] images with 1 and 2 labels"),
        ([], [], [], r"0 rows of \[\] images"),
        ([[]], ["a"], [], r"1 rows of \[0\] images"),
    ],
)
def test_unequal_numbers_are_refused(images, rows, columns, said):
    with pytest.raises(UserError, match=said):
        image_grid(images, rows, columns)


def test_save(tmp_path):
    save_png(flat(RED), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == RED
    with pytest.raises(UserError, match="cannot be written"):
        save_png(flat(RED), tmp_path / "gone" / "a.png")
