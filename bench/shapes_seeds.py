"""The shipped default run on the embedded world over several seeds, as a table for the docs.

    python bench/shapes_seeds.py                      # seeds 0 1 2, runs/seeds/, docs/shapes_results.md and a picture
    python bench/shapes_seeds.py --steps 2 --seeds 0 --runs runs/try --output runs/try.md

A run folder that is there and finished is read, not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sqdf_fast.config import make_config, parse_assignments
from sqdf_fast.display import image_grid, save_png
from sqdf_fast.errors import UserError
from sqdf_fast.runs import read_run, summarise
from sqdf_fast.runs.run import Run
from sqdf_fast.training.lifecycle import continue_run, new_run

COLUMNS = (
    "seed",
    "taste proxy (gain in base s.d.)",
    "true rule (gain)",
    "attribute accuracy (kept)",
    "diversity (kept)",
    "alignment (shuffled)",
    "training",
    "UNet evaluations",
)


def run_seed(seed: int, folder: Path, assignments: Sequence[str]) -> Run:
    """Train one seed into ``folder``, or go on where it stopped."""
    if (folder / "config.yaml").exists():
        continue_run(folder)
    else:
        settings = {"seed": seed, "model": "shapes"}
        new_run(make_config("shapes", assignments=parse_assignments(assignments), flags=settings), folder)
    return read_run(folder)


def row(run: Run) -> list[str]:
    """The cells of one run."""
    found = summarise(run.evaluations)
    pairs = (found.proxy, found.true, found.accuracy, found.diversity, found.alignment)
    if any(pair is None for pair in pairs) or found.proxy_gain is None or found.true_gain is None:
        raise UserError(f"run {run.folder} has no evaluation after training")
    proxy, true, accuracy, diversity, alignment = (pair or (0.0, 0.0) for pair in pairs)
    seconds = sum(step["seconds"] for step in run.steps)
    return [
        str(run.config["seed"]),
        f"{proxy[0]:.3f} → {proxy[1]:.3f} (+{found.proxy_gain:.2f})",
        f"{true[0]:.3f} → {true[1]:.3f} ({found.true_gain:+.3f})",
        f"{accuracy[0]:.1%} → {accuracy[1]:.1%} ({found.accuracy_kept:.0%})",
        f"{diversity[0]:.3f} → {diversity[1]:.3f} ({found.diversity_kept:.0%})",
        f"{alignment[0]:.3f} → {alignment[1]:.3f} ({found.shuffled:.3f})",
        f"{seconds:.0f} s",
        f"{sum(step['unet_evaluations'] for step in run.steps):,}",
    ]


def table(runs: Sequence[Run]) -> str:
    """A Markdown page."""
    rows = [row(run) for run in runs]
    gains = [summarise(run.evaluations).proxy_gain or 0.0 for run in runs]
    config, environment = runs[0].config, runs[0].environment
    images = config["evaluation"]["num_prompts"] * config["evaluation"]["images_per_prompt"]
    lines = [
        "# The default run on the embedded world",
        "",
        "`python bench/shapes_seeds.py` trains the shipped `shapes` preset once a seed and writes this page. Scores",
        f"are of {images} pictures of {config['evaluation']['num_prompts']} held-out prompts, the same noise before",
        "and after; arrows go from the base model to the fine-tuned one. Training never sees the true rule, nor what",
        "judges accuracy, diversity and alignment.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        f"Median gain of the proxy: {statistics.median(gains):.2f} standard deviations of the base model's score.",
        "Times are of one noisy machine and mean little: "
        + ", ".join(
            f"{name} {environment[name]}" for name in ("CPU cores", "torch threads", "torch") if name in environment
        )
        + ".",
        "",
    ]
    return "\n".join(lines)


def picture(run: Run, path: Path, pairs: int = 6) -> None:
    """The first pairs of a run's samples, before and after, as one PNG."""
    found = run.samples
    before, after = ([Image.open(file) for file in found.steps[step][:pairs] if file] for step in (0, run.last_step))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image_grid([before, after], ["before", "after"], found.prompts[: len(before)]), path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="fewer optimizer steps, for a try")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as sqdf-fast train's")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--output", type=Path, default=Path("docs/shapes_results.md"))
    given = parser.parse_args(arguments)
    assignments = [*given.set, *([f"steps={given.steps}"] if given.steps else [])]
    try:
        runs = [run_seed(seed, given.runs / f"seed-{seed}", assignments) for seed in given.seeds]
        given.output.write_text(table(runs), encoding="utf-8")
        picture(runs[0], given.output.parent / "images" / "before_after.png")
    except UserError as error:
        print(f"shapes_seeds: {error}", file=sys.stderr)
        return 2
    print(given.output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
