"""The study's figures as a page, from the folder that `sqdf-fast compare` wrote.

    python bench study runs/study       # docs/study_results.md, docs/images/study_*.png, bench/study/study_results.json
    python bench study runs/longer      # the same with longer_

The folder's name is that of its files; bench/study/NAME.yaml is what it was run with. Runs that have not finished are
left out, and the page names them. The report of the folder is written again with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.tables import Section, Table, markdown

from sqdf_fast.compare.command import Comparison, stored_protocol
from sqdf_fast.compare.page import verdict
from sqdf_fast.compare.results import Results, as_dict
from sqdf_fast.compare.table import (
    group_tables,
    label,
    missing_table,
    tuning_sentence,
    tuning_table,
)
from sqdf_fast.display import format_bytes
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors
from study.seeds import DOCS

HERE = Path(__file__).parent
PLOTS = {
    "": {
        "pictures": "methods_pictures_at_equal_reward.png",
        "true_reward": "methods_true_reward_against_proxy_reward.png",
        "alignment": "methods_alignment_against_proxy_reward.png",
        "diversity": "methods_diversity_against_proxy_reward.png",
        "compute": "methods_true_reward_against_unet_evaluations.png",
    },
    "gamma": {"gamma": "ablation_gamma_alignment_against_proxy_reward.png"},
    "lookahead": {"lookahead": "ablation_lookahead_proxy_reward_against_unet_evaluations.png"},
    "alpha": {"alpha": "ablation_alpha_true_reward_against_proxy_reward.png"},
}
"""The folder's plots that the page shows, under the heading of each group: the docs' name and the plot's."""

HeadsAndRows = tuple[Sequence[str], Sequence[Sequence[str]]]


def table(heads_and_rows: HeadsAndRows, title: str = "") -> Table:
    """A table of the page; short rows are filled up."""
    heads, rows = heads_and_rows
    return Table(heads, [[*row, *[""] * (len(heads) - len(row))] for row in rows], title, text=len(heads))


def cost_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: what each method and variant spends on training."""
    rows = []
    for run, end in zip(results.runs, results.end, strict=True):
        spent = [curve.points[-1].cost for curve in run.curves if "seconds" in curve.points[-1].cost]
        # The ablated method stands once, among the methods; training-free ones have their cost in every image.
        if not spent or run.training_free or (run.group and run.name == results.protocol.ablated):
            continue
        fastest = min(spent, key=lambda cost: cost["seconds"])
        counts = [fastest[name] for name in ("unet_evaluations", "reward_evaluations", "seconds")]
        peak = format_bytes(end.costs["peak_bytes"]) if "peak_bytes" in end.costs else "-"
        rows.append([run.label, *(f"{count:,.0f}" for count in counts), f"{1000 * counts[2] / counts[0]:.1f}", peak])
    return ["method", "UNet evaluations", "rewards", "seconds", "seconds per 1,000 UNet evaluations", "peak"], rows


def page(results: Results, name: str, images: Mapping[str, Sequence[str]]) -> list[Section]:
    """The page of a folder of that name; `images`: their addresses, by group."""
    protocol = results.protocol
    intro = [
        "[Findings](study.md), in words. What was decided beforehand: [bench/study](../bench/study/README.md).",
        f"    OMP_NUM_THREADS=1 sqdf-fast compare --protocol bench/study/{name}.yaml --output runs/{name} --jobs 2\n"
        f"    python bench study runs/{name}",
        f"{protocol.budget} UNet evaluations a run, seeds {', '.join(map(str, protocol.seeds))}. In brackets 95 %\n"
        "bootstrap intervals, over seeds and held-out prompts where single prompts have scores, else over seeds.\n"
        f"{', '.join(f'{part} {value}' for part, value in results.environment.items())}.",
    ]
    found = [Section(f"# Figures of bench/study/{name}.yaml", intro, verdict(results))]
    for group in results.groups:
        tables = [table(shown, f"{sentence}:") for sentence, shown in group_tables(results, group).values()]
        heading = f"## Ablation: {label(group)}" if group else "## Methods"
        found.append(Section(heading, images=images.get(group, ()), tables=tables))
    if (cost := cost_table(results))[1]:
        said = "The machine was shared: this is the fastest seed of each, and the largest peak of any."
        found.append(Section("## Cost of a whole run", [said], tables=[table(cost)]))
    if results.choices:
        found.append(Section("## Tuning", [tuning_sentence(results)], tables=[table(tuning_table(results))]))
    if (missing := missing_table(results))[1]:
        found.append(Section("## Runs that are missing", tables=[table(missing)]))
    return found


def record(folder: Path, docs: Path, figures: Path) -> Results:
    """Write page, images and figures of the comparison in `folder`. Raises UserError."""
    results, name = Comparison(stored_protocol(folder), folder).report(), folder.resolve().name
    shown: dict[str, list[str]] = {}
    with disk_errors(docs):
        (docs / "images").mkdir(parents=True, exist_ok=True)
        for group in results.groups:
            for short, plot in PLOTS.get(group, {}).items():
                if (path := folder / "plots" / plot).exists():
                    shutil.copyfile(path, docs / "images" / f"{name}_{short}.png")
                    shown.setdefault(group, []).append(f"images/{name}_{short}.png")
        (docs / f"{name}_results.md").write_text(markdown(page(results, name, shown)), encoding="utf-8")
        text = json.dumps(as_dict(results, folder), separators=(",", ":"))
        (figures / f"{name}_results.json").write_text(text + "\n", encoding="utf-8")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--output", type=Path, help="folder of everything written, for a trial (default: docs)")
    given = parser.parse_args(arguments)
    name = given.folder.resolve().name
    if not (HERE / f"{name}.yaml").exists():
        raise UserError(f"bench/study has no {name}.yaml: name the folder after one of bench/study/*.yaml")
    print("\n".join(verdict(record(given.folder, given.output or DOCS, given.output or HERE))))
