"""What judges said of several models, side by side: a table, a sheet of pictures, a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sqdf_fast.display.elements import figure_table
from sqdf_fast.display.grid import image_grid, save_png
from sqdf_fast.evaluate.judge import Better
from sqdf_fast.files import disk_errors
from sqdf_fast.rewards.preprocess import to_pil

Scores = dict[str, float | None]

ARROWS: dict[Better, str] = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", "neither": ""}
# Prompts on the sheet: more would be too small to see.
SHOWN = 16


@dataclass(frozen=True)
class Verdict:
    """Scores of models on the same prompts and noise; the first one is what the others are compared with.

    Attributes:
        reward: what ``proxy_reward`` is; prompts: N, one a picture; seed: of the noise.
        scores: by label, the ``eval_*`` values of :func:`sqdf_fast.evaluate.evaluate_images`.
        better: which direction is good, by the score's name without ``eval_``.
        images: by label, float [N, 3, H, W] in [0, 1].
    """

    reward: str
    prompts: list[str]
    seed: int
    scores: Mapping[str, Scores]
    better: Mapping[str, Better]
    images: Mapping[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without the pictures."""
        distinct = list(dict.fromkeys(self.prompts))
        return {
            "reward": self.reward,
            "prompts": distinct,
            "pictures": len(self.prompts),
            "seed": self.seed,
            "better": dict(self.better),
            "scores": {label: dict(scores) for label, scores in self.scores.items()},
        }

    def rows(self) -> list[list[str]]:
        """A heading, then a row a score that any model has: its name, then of each model the value and interval."""
        rows = [["", *self.scores]]
        for name in next(iter(self.scores.values())):
            values = [scores.get(name) for scores in self.scores.values()]
            if name.endswith(("_low", "_high", "_std")) or all(value is None for value in values):
                continue
            plain = name.removeprefix("eval_")
            label = plain.replace("_", " ") + ARROWS[self.better.get(plain, "neither")]
            rows.append([label, *(_shown(scores, name) for scores in self.scores.values())])
        return rows

    def as_text(self) -> str:
        """A table, one score a line; 95 % bootstrap intervals over prompts in brackets."""
        rows = self.rows()
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def sheet(self) -> Image.Image:
        """The first picture of up to 16 prompts, a row each, a column a model."""
        rows = list({prompt: row for row, prompt in reversed(list(enumerate(self.prompts)))}.items())[::-1][:SHOWN]
        chosen = [row for _, row in rows]
        columns = [to_pil(images[chosen]) for images in self.images.values()]
        pictures = [picture for line in zip(*columns, strict=True) for picture in line]
        labels = [f"{label}: {prompt}" for prompt, _ in rows for label in self.images]
        return image_grid(pictures, labels, columns=len(columns))

    def save_sheet(self, path: Path) -> None:
        """Write the sheet as PNG. Raises UserError when the disk refuses."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_png(self.sheet(), path)

    def save_page(self, path: Path) -> None:
        """Write table and sheet as one HTML file that asks the network for nothing. Raises UserError as above."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The HTML of :meth:`save_page`."""
        buffer = io.BytesIO()
        self.sheet().save(buffer, format="PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        heading, *rows = self.rows()
        distinct = len(set(self.prompts))
        title = " against ".join(reversed(list(self.scores))) if len(self.scores) == 2 else "Models side by side"
        facts = (
            f"Reward {self.reward}; {len(self.prompts)} pictures of {distinct} prompts, the same noise for all "
            f"(seed {self.seed}). Small: 95 % bootstrap intervals over prompts; the arrow is the good direction."
        )
        style = files("sqdf_fast.runs").joinpath("report.css").read_text(encoding="utf-8")
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{escape(title)}</title><style>{style}</style></head><body><main><h1>{escape(title)}</h1>"
            f'<p class="soft">{escape(facts)}</p>{figure_table(heading, rows)}<h2>Pictures</h2>'
            f'<img src="data:image/png;base64,{picture}" alt="pictures of each model" style="max-width:100%">'
            "</main></body></html>\n"
        )


def _shown(scores: Scores, name: str) -> str:
    found = [scores.get(f"{name}{end}") for end in ("", "_low", "_high")]
    value, low, high = (None if number is None else _number(number) for number in found)
    if value is None:
        return "-"
    return value if low is None or high is None else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
