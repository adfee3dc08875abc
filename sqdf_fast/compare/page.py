"""``report.html`` of a comparison, its plots as files, and a sheet of images at equal reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sqdf_fast.compare.curves import Estimate
from sqdf_fast.compare.figures import figures, prefix
from sqdf_fast.compare.protocol import dump_protocol
from sqdf_fast.compare.results import PairwiseComparison, Results
from sqdf_fast.compare.table import (
    comparison_sentence,
    comparison_table,
    end_table,
    equal_table,
    label,
    level_sentence,
    missing_table,
    tuning_sentence,
    tuning_table,
)
from sqdf_fast.display import image_grid, save_png
from sqdf_fast.display.pages import render_page
from sqdf_fast.display.plots import Chart
from sqdf_fast.files import write_text
from sqdf_fast.runs.samples import read_samples

VERDICT_SCORES = ("true_reward", "attribute_accuracy", "alignment", "diversity")
GRID_COLUMNS = 8
# Name, prompts and images of one method.
Row = tuple[str, list[str], list[Path | None]]


def write_page(results: Results, folder: Path) -> Path:
    """Write ``report.html`` and ``plots/``. Raises UserError when the disk refuses."""
    drawn = {group: figures(results, group) for group in results.groups}
    for group, charts in drawn.items():
        for name, chart in charts.items():
            for kind in ("svg", "png"):
                chart.save(folder / "plots" / f"{name}.{kind}")
        _save_sheet(results, group, folder)
    path = folder / "report.html"
    write_text(path, render_comparison(results, drawn))
    return path


def render_comparison(results: Results, drawn: Mapping[str, Mapping[str, Chart]]) -> str:
    """The page as text. It asks the network for nothing."""
    protocol = results.protocol
    methods = results.of("")
    return render_page(
        Path(__file__).with_name("report.html"),
        title=f"{len(methods)} method{'s' * (len(methods) > 1)} under one budget",
        facts=[f"{_budget(protocol.budget)} a run", f"seeds {', '.join(map(str, protocol.seeds))}"],
        verdict=verdict(results),
        missing=missing_table(results),
        groups=[_group(results, group, drawn[group]) for group in results.groups],
        tuning=_tuning(results),
        protocol=dump_protocol(protocol),
        environment=results.environment,
    )


def _budget(text: str) -> str:
    return f"{int(text):,} UNet evaluations" if text.isdigit() else text


def verdict(results: Results) -> list[str]:
    """A sentence a score: than whose the first method's is clearly higher or lower at equal reward."""
    comparisons = results.comparisons_of("")
    if not comparisons:
        return ["Fewer than two methods have finished runs."]
    found = [(score, words) for score in VERDICT_SCORES if (words := _comparison_words(comparisons, score))]
    if not found:
        return ["No score but the proxy reward was measured."]
    (score, words), *others = found
    first = f"At equal proxy reward, the {label(score)} of {comparisons[0].one} is {words}."
    return [first, *(f"Its {label(score)} is {words}." for score, words in others)]


def _comparison_words(comparisons: Sequence[PairwiseComparison], score: str) -> str:
    signs = {one.other: _sign(one.differences[score]) for one in comparisons if score in one.differences}
    words = {1: "higher than", -1: "lower than", 0: "not clearly different from"}
    names = {word: [name for name, found in signs.items() if found == sign] for sign, word in words.items()}
    return "; ".join(f"{word} {', '.join(others)}" for word, others in names.items() if others)


def _sign(found: Estimate) -> int:
    if found.low is None or found.high is None:
        return 0
    return 1 if found.low > 0 else -1 if found.high < 0 else 0


def _group(results: Results, group: str, drawn: Mapping[str, Chart]) -> dict[str, Any]:
    """One section of the page: plots, images and tables of the methods, or of one axis of an ablation."""
    rows = _at_equal_reward(results, group)
    level = level_sentence(results, group)
    compared = bool(results.comparisons_of(group))
    return {
        "heading": f"Ablation: {label(group)}" if group else "Methods",
        "charts": list(drawn.values()),
        "film": (rows[0][1], [(name, paths) for name, _, paths in rows]) if rows else None,
        "differences": (comparison_sentence(results, group), comparison_table(results, group)) if compared else None,
        "equal": (level, equal_table(results, group)) if level else None,
        "end": end_table(results, group),
    }


def _at_equal_reward(results: Results, group: str) -> list[Row]:
    """Images of the base model first, then of each method that reaches the level, of its first seed."""
    found: list[Row] = []
    for index in results.of(group):
        run = results.runs[index]
        position = results.positions[index][0] if run.folders else None
        if position is None:
            continue
        samples = read_samples(run.folders[0])
        steps = [0, run.curves[0].points[position.nearest].step]
        if any(step not in samples.steps for step in steps):
            continue
        prompts = samples.prompts[:GRID_COLUMNS]
        if not found:
            found.append(("base model", prompts, samples.steps[0][:GRID_COLUMNS]))
        found.append((run.label, prompts, samples.steps[steps[1]][:GRID_COLUMNS]))
    return found


def _save_sheet(results: Results, group: str, folder: Path) -> None:
    rows = _at_equal_reward(results, group)
    if rows:
        images = [[None if path is None else _opened(path) for path in paths] for _, _, paths in rows]
        sheet = image_grid(images, [name for name, _, _ in rows], rows[0][1], tile=96)
        save_png(sheet, folder / "plots" / f"{prefix(group)}_pictures_at_equal_reward.png")


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _tuning(results: Results) -> dict[str, Any] | None:
    tuning = results.protocol.tuning
    if tuning is None or not results.choices:
        return None
    effort = f"{tuning.trials} trials a method, {_budget(tuning.budget)} each, seed {tuning.seed}."
    return {"sentence": f"{effort} {tuning_sentence(results)}", "table": tuning_table(results)}
