"""The shipped default run on the embedded model over several seeds, as a page.

    python bench seeds                                # seeds 0 1 2; docs/shapes_results.md and an image
    python bench seeds --steps 2 --seeds 0 --runs runs/try --output runs/try

A finished run is read from its folder, not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from harness.tables import Section, markdown, of_rows
from PIL import Image

from sqdf_fast.config import make_config, parse_assignments
from sqdf_fast.display import image_grid, save_png
from sqdf_fast.errors import UserError
from sqdf_fast.runs import Summary, read_run
from sqdf_fast.runs.run import Run
from sqdf_fast.training.lifecycle import continue_run, new_run

DOCS = Path(__file__).parents[2] / "docs"


def trained(folder: Path, seed: int, assignments: Sequence[str]) -> Run:
    """Train one seed into ``folder``, or continue where it stopped, and read it."""
    if not (folder / "config.yaml").exists():
        settings = parse_assignments(assignments)
        new_run(make_config("shapes", assignments=settings, flags={"seed": seed, "model": "shapes"}), folder)
    elif read_run(folder).ended is None:
        continue_run(folder)
    return read_run(folder)


def parser(command: str, about: str | None, runs: str) -> argparse.ArgumentParser:
    """The options of a command that trains on several seeds."""
    found = argparse.ArgumentParser(
        prog=f"python bench {command}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--steps", type=int, help="fewer optimizer steps, for a trial")
    found.add_argument("--runs", type=Path, default=Path(runs), help="folder of the runs (default: %(default)s)")
    found.add_argument("--output", type=Path, help="folder of everything written, for a trial (default: docs)")
    return found


def row(run: Run) -> dict[str, str]:
    """The cells of one run, by the heads of their columns."""
    found = Summary(run.evaluations)
    pairs = (found.proxy, found.true, found.accuracy, found.diversity, found.alignment)
    if any(pair is None for pair in pairs) or found.proxy_gain is None or found.true_gain is None:
        raise UserError(f"run {run.folder} has no evaluation after training")
    proxy, true, accuracy, diversity, alignment = (pair or (0.0, 0.0) for pair in pairs)
    return {
        "seed": str(run.config["seed"]),
        "taste proxy (gain in base s.d.)": f"{proxy[0]:.3f} → {proxy[1]:.3f} (+{found.proxy_gain:.2f})",
        "true rule (gain)": f"{true[0]:.3f} → {true[1]:.3f} ({found.true_gain:+.3f})",
        "attribute accuracy (kept)": f"{accuracy[0]:.1%} → {accuracy[1]:.1%} ({found.accuracy_kept:.0%})",
        "diversity (kept)": f"{diversity[0]:.3f} → {diversity[1]:.3f} ({found.diversity_kept:.0%})",
        "alignment (shuffled)": f"{alignment[0]:.3f} → {alignment[1]:.3f} ({found.shuffled:.3f})",
        "training": f"{sum(step['seconds'] for step in run.steps):.0f} s",
        "UNet evaluations": f"{sum(step['unet_evaluations'] for step in run.steps):,}",
    }


def page(runs: Sequence[Run]) -> list[Section]:
    """The page of these runs."""
    gains = [Summary(run.evaluations).proxy_gain or 0.0 for run in runs]
    evaluation, environment = runs[0].config["evaluation"], runs[0].environment
    machine = [f"{name} {environment[name]}" for name in ("CPU cores", "torch threads", "torch") if name in environment]
    images = evaluation["num_prompts"] * evaluation["images_per_prompt"]
    intro = [
        "`python bench seeds` trains the shipped `shapes` preset once per seed and writes this page. Scores are of",
        f"{images} images of {evaluation['num_prompts']} held-out prompts, the same noise before and after; arrows go",
        "from the base model to the fine-tuned one. Training never sees the true rule, nor the judges of accuracy,",
        "diversity and alignment.",
    ]
    end = [
        f"Median gain of the proxy: {statistics.median(gains):.2f} standard deviations of the base model's score.",
        f"Times are of one noisy machine and mean little: {', '.join(machine)}.",
    ]
    head = Section("# The default run on the embedded model", ["\n".join(intro)], tables=[of_rows(map(row, runs))])
    return [head, Section(text=["\n".join(end)])]


def before_after(run: Run, path: Path, pairs: int = 6) -> None:
    """The first pairs of a run's samples, before and after, as one PNG."""
    found = run.samples
    before, after = ([Image.open(file) for file in found.steps[step][:pairs] if file] for step in (0, run.last_step))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image_grid([before, after], ["before", "after"], found.prompts[: len(before)]), path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("seeds", __doc__, "runs/seeds")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as sqdf-fast train's")
    given = options.parse_args(arguments)
    assignments = [*given.set, *([f"steps={given.steps}"] if given.steps else [])]
    docs = given.output or DOCS
    runs = [trained(given.runs / f"seed-{seed}", seed, assignments) for seed in given.seeds]
    docs.mkdir(parents=True, exist_ok=True)
    text = markdown(page(runs))
    (docs / "shapes_results.md").write_text(text, encoding="utf-8")
    before_after(runs[0], docs / "images" / "before_after.png")
    print(text)
