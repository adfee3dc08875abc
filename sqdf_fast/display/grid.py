"""Sheets of pictures that say what they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors

GAP = 12
TEXT = (40, 44, 52)
FAINT = (110, 116, 128)
PAPER = (255, 255, 255)


def image_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int = 4,
    tile: int = 160,
) -> Image.Image:
    """Pictures in reading order, each over its label; long labels wrap.

    Args:
        images: N >= 1 pictures of any size; each is scaled to fit a square of ``tile`` pixels.
        labels: N captions.
    """
    if not images or len(images) != len(labels):
        raise UserError(
            f"a grid needs one label a picture and at least one: {len(images)} pictures, {len(labels)} labels"
        )
    return _sheet([(image,) for image in images], labels, (), min(columns, len(images)), tile)


def before_after_grid(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int = 3,
    tile: int = 144,
) -> Image.Image:
    """Pairs from the same seed and prompt, side by side; the order is that of ``labels``.

    Args:
        before, after: N >= 1 pictures each.
        labels: N captions, the prompts.
    """
    if not labels or not len(before) == len(after) == len(labels):
        raise UserError(
            f"a before/after grid needs as many pictures before as after, and a label each: "
            f"{len(before)}, {len(after)} and {len(labels)} given"
        )
    pairs = list(zip(before, after, strict=True))
    return _sheet(pairs, labels, ("before", "after"), min(columns, len(pairs)), tile)


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` to ``path``. Raises UserError when the disk refuses."""
    with disk_errors(path):
        image.save(path, format="PNG")


def _sheet(
    groups: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    headings: Sequence[str],
    columns: int,
    tile: int,
) -> Image.Image:
    text_size = max(12, tile // 11)
    font = ImageFont.load_default(size=text_size)
    line_height = round(text_size * 1.3)
    inner = 4
    width = len(groups[0]) * (tile + inner) - inner
    wrapped = [_wrap(label, font, width) for label in labels]
    rows = [range(start, min(start + columns, len(groups))) for start in range(0, len(groups), columns)]
    heading_height = line_height if headings else 0
    heights = [tile + 6 + line_height * max(len(wrapped[index]) for index in row) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP + heading_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for position, heading in enumerate(headings):
            left = GAP + column * (width + GAP) + position * (tile + inner)
            draw.text((left, GAP // 2), heading, FAINT, font)
    top = GAP + heading_height
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = GAP + column * (width + GAP)
            for position, image in enumerate(groups[index]):
                _paste(sheet, image, left + position * (tile + inner), top, tile)
            for number, line in enumerate(wrapped[index]):
                draw.text((left, top + tile + 6 + number * line_height), line, TEXT, font)
        top += height
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, tile: int) -> None:
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(scaled, (left + (tile - size[0]) // 2, top + (tile - size[1]) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of ``text`` no wider than ``width``; a word that is wider by itself is broken."""
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
