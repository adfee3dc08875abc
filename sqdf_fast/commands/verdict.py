"""The scores of several models, side by side: a table, a sheet of images, a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sqdf_fast.display import image_grid, save_png, text_table
from sqdf_fast.display.pages import render_page
from sqdf_fast.evaluate.judge import Better
from sqdf_fast.files import disk_errors, write_text
from sqdf_fast.rewards.preprocess import to_pil

Scores = dict[str, float | None]

ARROWS: dict[Better, str] = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", "neither": ""}
SHOWN = 16
"""Prompts on the sheet."""


@dataclass(frozen=True)
class Verdict:
    """Scores of models on the same prompts and noise; the first one is the baseline of the others.

    Attributes:
        reward: behind ``proxy_reward``; prompts: N, one per image; seed: of the noise.
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
        """For JSON; without the images."""
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
        """A heading, then a row for each score that any model has: its name, and each model's value and interval."""
        rows = [["", *self.scores]]
        for name in next(iter(self.scores.values())):
            values = [scores.get(name) for scores in self.scores.values()]
            if name.endswith(("_low", "_high", "_std")) or all(value is None for value in values):
                continue
            plain = name.removeprefix("eval_")
            label = plain.replace("_", " ") + ARROWS[self.better.get(plain, "neither")]
            rows.append([label, *("-" if s.get(name) is None else _shown(s, name) for s in self.scores.values())])
        return rows

    def as_text(self) -> str:
        """A table with a line per score; 95 % bootstrap intervals over prompts in brackets."""
        heading, *rows = self.rows()
        return text_table(heading, rows)

    def sheet(self) -> Image.Image:
        """The first image of up to 16 prompts: a row per prompt, a column per model."""
        first = {prompt: index for index, prompt in reversed(list(enumerate(self.prompts)))}
        prompts = list(dict.fromkeys(self.prompts))[:SHOWN]
        columns = [to_pil(images[[first[prompt] for prompt in prompts]]) for images in self.images.values()]
        return image_grid(list(zip(*columns, strict=True)), prompts, list(self.images), tile=160)

    def save_sheet(self, path: Path) -> None:
        """Write the sheet as PNG. Raises UserError when the disk refuses."""
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_png(self.sheet(), path)

    def save_page(self, path: Path) -> None:
        """Write table and sheet as one self-contained HTML file. Raises UserError when the disk refuses."""
        heading, *rows = self.rows()
        page = render_page(
            Path(__file__).with_name("verdict.html"),
            title=" against ".join(reversed(list(self.scores))) if len(self.scores) == 2 else "Models side by side",
            verdict=self,
            heading=heading,
            rows=rows,
            sheet=self.sheet(),
        )
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)


def _shown(scores: Scores, name: str) -> str:
    values = [scores.get(f"{name}{end}") for end in ("", "_low", "_high")]
    value, *interval = (f"{x:.4f}" if 0 < abs(x) < 0.1 else f"{x:.3f}" for x in values if x is not None)
    return f"{value} [{', '.join(interval)}]" if len(interval) == 2 else value
