"""``report.html`` of a comparison, its plots as files, and a sheet of images at equal reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sqdf_fast.compare.figures import figures, prefix
from sqdf_fast.compare.protocol import dump_protocol
from sqdf_fast.compare.results import Results
from sqdf_fast.compare.table import group_tables, label, missing_table, tuning_sentence, tuning_table
from sqdf_fast.display import image_grid, save_png
from sqdf_fast.display.pages import render_page
from sqdf_fast.display.plots import Chart
from sqdf_fast.files import write_text
from sqdf_fast.runs.samples import read_samples

VERDICT_SCORES = ("true_reward", "attribute_accuracy", "alignment", "diversity")
GRID_COLUMNS = 8
# Prompts, and a name with the images of the prompts per row.
Film = tuple[list[str], list[tuple[str, list[Path | None]]]]


def write_page(results: Results, folder: Path) -> Path:
    """Write ``report.html`` and ``plots/``. Raises UserError when the disk refuses."""
    groups = []
    for group in results.groups:
        charts, film = figures(results, group), _film(results, group)
        for name, chart in charts.items():
            for kind in ("svg", "png"):
                chart.save(folder / "plots" / f"{name}.{kind}")
        if film:
            images = [[None if path is None else _opened(path) for path in paths] for _, paths in film[1]]
            sheet = image_grid(images, [name for name, _ in film[1]], film[0], tile=96)
            save_png(sheet, folder / "plots" / f"{prefix(group)}_pictures_at_equal_reward.png")
        groups.append(_group(results, group, charts, film))
    path = folder / "report.html"
    write_text(path, _render(results, groups))
    return path


def _render(results: Results, groups: list[dict[str, Any]]) -> str:
    protocol, methods = results.protocol, results.of("")
    tuning = protocol.tuning if results.choices else None
    effort = tuning and f"{tuning.trials} trials a method, {_budget(tuning.budget)} each, seed {tuning.seed}."
    return render_page(
        Path(__file__).with_name("report.html"),
        title=f"{len(methods)} method{'s' * (len(methods) > 1)} under one budget",
        facts=[f"{_budget(protocol.budget)} a run", f"seeds {', '.join(map(str, protocol.seeds))}"],
        verdict=verdict(results),
        missing=missing_table(results),
        groups=groups,
        tuning=tuning and {"sentence": f"{effort} {tuning_sentence(results)}", "table": tuning_table(results)},
        protocol=dump_protocol(protocol),
        environment=results.environment,
    )


def _budget(text: str) -> str:
    return f"{int(text):,} UNet evaluations" if text.isdigit() else text


def verdict(results: Results) -> list[str]:
    """A sentence per score: where the first method is clearly higher or lower than another at equal reward."""
    comparisons = results.comparisons_of("")
    if not comparisons:
        return ["Fewer than two methods have finished runs."]
    sentences: list[str] = []
    for score in VERDICT_SCORES:
        found = {one.other: one.differences[score] for one in comparisons if score in one.differences}
        # Without an interval, no difference is clear.
        signs = {name: ((one.low or 0) > 0) - ((one.high or 0) < 0) for name, one in found.items()}
        words = {1: "higher than", -1: "lower than", 0: "not clearly different from"}
        names = {word: [name for name, found in signs.items() if found == sign] for sign, word in words.items()}
        if said := "; ".join(f"{word} {', '.join(others)}" for word, others in names.items() if others):
            first = f"At equal proxy reward, the {label(score)} of {comparisons[0].one}"
            sentences.append(f"{f'Its {label(score)}' if sentences else first} is {said}.")
    return sentences or ["No score but the proxy reward was measured."]


def _group(results: Results, group: str, charts: Mapping[str, Chart], film: Film | None) -> dict[str, Any]:
    """One section of the page: plots, images and tables of the methods, or of one axis of an ablation."""
    heading = f"Ablation: {label(group)}" if group else "Methods"
    return {"heading": heading, "charts": list(charts.values()), "film": film, "tables": group_tables(results, group)}


def _film(results: Results, group: str) -> Film | None:
    """Images of the base model, then of the first seed of each method that reaches the level."""
    prompts: list[str] = []
    rows: list[tuple[str, list[Path | None]]] = []
    for index in results.of(group):
        run = results.runs[index]
        position = results.positions[index][0] if run.folders else None
        if position is None:
            continue
        samples = read_samples(run.folders[0])
        step = run.curves[0].points[position.nearest].step
        if not {0, step} <= samples.steps.keys():
            continue
        if not rows:
            prompts = samples.prompts[:GRID_COLUMNS]
            rows.append(("base model", samples.steps[0][:GRID_COLUMNS]))
        rows.append((run.label, samples.steps[step][:GRID_COLUMNS]))
    return (prompts, rows) if rows else None


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
