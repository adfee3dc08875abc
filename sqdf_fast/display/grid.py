"""Labeled grids of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors

# Pixels: gap between images, and width of the row labels.
GAP, NAME_WIDTH = 6, 150
TEXT = (40, 44, 52)
FAINT = (110, 116, 128)
PAPER = (255, 255, 255)
_FONT_SIZE, _LINE = 13, 16


def image_grid(
    images: Sequence[Sequence[Image.Image | None]], rows: Sequence[str], columns: Sequence[str] = (), tile: int = 128
) -> Image.Image:
    """Rows of images with a label left of each row and above each column; long labels wrap.

    Args:
        images: images of any size by row, scaled to fit a square of ``tile`` pixels. None leaves a gap.
        rows, columns: labels; columns may be empty.

    Raises:
        UserError: no image, or a wrong number of labels.
    """
    widths = {len(row) for row in images}
    if len(widths) != 1 or 0 in widths or len(rows) != len(images) or (columns and widths != {len(columns)}):
        given = f"{len(images)} rows of {sorted(widths)} images with {len(rows)} and {len(columns)} labels"
        raise UserError(f"an image grid needs rows of equal length and a label for each row and column, not {given}")
    font = ImageFont.load_default(size=_FONT_SIZE)
    names = [_wrap(name, font, NAME_WIDTH - 2 * GAP) for name in rows]
    heads = [_wrap(name, font, tile) for name in columns]
    width, left = len(images[0]), NAME_WIDTH + GAP
    top = GAP + _LINE * max(map(len, heads), default=0)
    heights = [max(tile, _LINE * len(lines)) for lines in names]
    size = (left + width * (tile + GAP), top + GAP + sum(heights) + GAP * len(heights))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        draw.text((left + column * (tile + GAP), GAP), "\n".join(lines), FAINT, font)
    top += GAP
    for row, lines, height in zip(images, names, heights, strict=True):
        draw.text((NAME_WIDTH - GAP, top + height / 2), "\n".join(lines), TEXT, font, "rm", align="right")
        for column, image in enumerate(row):
            if image is not None:
                _paste(sheet, image, left + column * (tile + GAP), top, tile)
        top += height + GAP
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` to ``path``. Raises UserError when the disk refuses."""
    with disk_errors(path):
        image.save(path, format="PNG")


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, tile: int) -> None:
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(scaled, (left + (tile - size[0]) // 2, top + (tile - size[1]) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of ``text`` no wider than ``width`` pixels; wider words are broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines or [""]
