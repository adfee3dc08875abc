"""``samples/``: images of the same seeds and prompts at several steps of training.

samples/samples.json            [{"prompt": ..., "seed": ...}, ...]
samples/step_000000/00.png ...  one image per entry
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sqdf_fast.files import disk_errors
from sqdf_fast.rewards.preprocess import to_pil

_STEP = re.compile(r"step_(\d{6,})")


class Samples(NamedTuple):
    """The samples of a run folder.

    Attributes:
        prompts, seeds: one entry per image.
        steps: file of each image, None if it is missing, by training step in order.
    """

    prompts: list[str]
    seeds: list[int | None]
    steps: dict[int, list[Path | None]]


def save_samples(run_folder: Path, step: int, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the images of one step, and the list of prompts and seeds.

    Args:
        images: float [N, 3, H, W] in [0, 1].

    Raises:
        UserError: the disk refuses.
    """
    folder = run_folder / "samples" / f"step_{step:06d}"
    listing = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "samples.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        for index, image in enumerate(to_pil(images)):
            image.save(folder / f"{index:02d}.png", format="PNG")


def read_samples(run_folder: Path) -> Samples:
    """The samples of a run folder; empty if their list is missing or damaged."""
    folder = run_folder / "samples"
    try:
        listing: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        prompts = [str(entry["prompt"]) for entry in listing]
        seeds = [entry.get("seed") for entry in listing]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Samples([], [], {})
    steps = {}
    for match in filter(None, (_STEP.fullmatch(path.name) for path in folder.iterdir())):
        files = [folder / match[0] / f"{index:02d}.png" for index in range(len(prompts))]
        steps[int(match[1])] = [file if file.is_file() else None for file in files]
    return Samples(prompts, seeds, dict(sorted(steps.items())))
