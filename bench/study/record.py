"""The study's figures as a page, from the folder that `sqdf-fast compare` wrote.

    python bench/study/record.py runs/study       # docs/study_results.md and .json, docs/images/study_*.png
    python bench/study/record.py runs/longer      # the same with longer_

The folder's name is that of its files; what it was run with is bench/study/NAME.yaml.
What is not finished is left out and said. The report of the folder is written again with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqdf_fast.compare.command import Comparison, stored_protocol
from sqdf_fast.compare.page import verdict
from sqdf_fast.compare.results import Results, as_dict
from sqdf_fast.compare.table import (
    duel_sentence,
    duel_table,
    end_table,
    equal_table,
    label,
    level_sentence,
    missing_table,
    tuning_sentence,
    tuning_table,
)
from sqdf_fast.display import format_bytes
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors

PICTURES = {
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
"""What the page shows of the folder's plots, under the heading of each group; the docs' name and the plot's."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up."""
    full = [[*row, *[""] * (len(heads) - len(row))] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *full)]


def cost_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: what each method and variant spends on training."""
    rows = []
    for run, end in zip(results.runs, results.end, strict=True):
        spent = [curve.points[-1].cost for curve in run.curves if "seconds" in curve.points[-1].cost]
        # The ablated method stands once, among the methods; training-free ones have their cost in every picture.
        if not spent or run.free or (run.group and run.name == results.protocol.ablated):
            continue
        fastest = min(spent, key=lambda cost: cost["seconds"])
        counts = [fastest[name] for name in ("unet_evaluations", "reward_evaluations", "seconds")]
        peak = format_bytes(end.costs["peak_bytes"]) if "peak_bytes" in end.costs else "-"
        rows.append([run.label, *(f"{count:,.0f}" for count in counts), f"{1000 * counts[2] / counts[0]:.1f}", peak])
    return ["method", "UNet evaluations", "rewards", "seconds", "seconds per 1,000 UNet evaluations", "peak"], rows


def page(results: Results, name: str, pictures: Mapping[str, Sequence[str]]) -> str:
    """The Markdown page of a folder of that name; `pictures` are names of files in docs/images, by group."""
    protocol = results.protocol
    lines = [
        f"# Figures of bench/study/{name}.yaml",
        "",
        "[Findings](study.md), in words. What was decided beforehand: [bench/study](../bench/study/README.md).",
        "",
        f"    OMP_NUM_THREADS=1 sqdf-fast compare --protocol bench/study/{name}.yaml --output runs/{name} --jobs 2",
        f"    python bench/study/record.py runs/{name}",
        "",
        f"{protocol.budget} UNet evaluations a run, seeds {', '.join(map(str, protocol.seeds))}. In brackets 95 %",
        "bootstrap intervals, over seeds and held-out prompts where single prompts have scores, else over seeds.",
        ", ".join(f"{part} {value}" for part, value in results.environment.items()) + ".",
        "",
        *(f"- {line}" for line in verdict(results)),
    ]
    for group in results.groups:
        lines += ["", f"## Ablation: {label(group)}" if group else "## Methods"]
        shown = pictures.get(group, ())
        lines += [text for file in shown for text in ("", f"![{Path(file).stem.replace('_', ' ')}](images/{file})")]
        if results.duels_of(group):
            lines += ["", f"{duel_sentence(results, group)}:", "", *table(*duel_table(results, group))]
        if sentence := level_sentence(results, group):
            lines += ["", f"{sentence}:", "", *table(*equal_table(results, group))]
        lines += ["", "At the end of training:", "", *table(*end_table(results, group))]
    heads, rows = cost_table(results)
    if rows:
        said = "The machine was shared: this is the fastest seed of each, and the largest peak of any."
        lines += ["", "## Cost of a whole run", "", said, "", *table(heads, rows)]
    if results.choices:
        lines += ["", "## Tuning", "", tuning_sentence(results), "", *table(*tuning_table(results))]
    heads, rows = missing_table(results)
    if rows:
        lines += ["", "## Runs that are missing", "", *table(heads, rows)]
    return "\n".join([*lines, ""])


def record(folder: Path, docs: Path) -> Results:
    """Write page, figures and pictures of the comparison in `folder`. Raises UserError."""
    results, name = Comparison(stored_protocol(folder), folder).report(), folder.resolve().name
    shown: dict[str, list[str]] = {}
    with disk_errors(docs):
        (docs / "images").mkdir(parents=True, exist_ok=True)
        for group in results.groups:
            for short, plot in PICTURES.get(group, {}).items():
                if (path := folder / "plots" / plot).exists():
                    shutil.copyfile(path, docs / "images" / f"{name}_{short}.png")
                    shown.setdefault(group, []).append(f"{name}_{short}.png")
        (docs / f"{name}_results.md").write_text(page(results, name, shown), encoding="utf-8")
        figures = json.dumps(as_dict(results, folder), separators=(",", ":"))
        (docs / f"{name}_results.json").write_text(figures + "\n", encoding="utf-8")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args(arguments)
    name = given.folder.resolve().name
    try:
        if not Path(__file__).with_name(f"{name}.yaml").exists():
            raise UserError(
                f"bench/study has no {name}.yaml: the folder's name has to be a study's, see bench/study/*.yaml"
            )
        results = record(given.folder, given.docs)
    except UserError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    print("\n".join(verdict(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
