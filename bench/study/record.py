"""The study's figures as a page, from the folder that `sqdf-fast compare` wrote.

    python bench/study/record.py runs/study      # docs/study_results.md and .json, docs/images/study_*.png

What is not finished is left out and said. The report of the folder is written again with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqdf_fast.checkpoint import disk_errors
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
from sqdf_fast.errors import UserError

PICTURES = {
    "": {
        "study_pictures.png": "methods_pictures_at_equal_reward.png",
        "study_true_reward.png": "methods_true_reward_against_proxy_reward.png",
        "study_alignment.png": "methods_alignment_against_proxy_reward.png",
        "study_diversity.png": "methods_diversity_against_proxy_reward.png",
        "study_compute.png": "methods_true_reward_against_unet_evaluations.png",
    },
    "gamma": {"study_gamma.png": "ablation_gamma_alignment_against_proxy_reward.png"},
    "lookahead": {"study_lookahead.png": "ablation_lookahead_proxy_reward_against_unet_evaluations.png"},
    "alpha": {"study_alpha.png": "ablation_alpha_true_reward_against_proxy_reward.png"},
}
"""What the page shows of the folder's plots, under the heading of each group."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up."""
    full = [[*row, *[""] * (len(heads) - len(row))] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *full)]


def page(results: Results, pictures: Mapping[str, Sequence[str]]) -> str:
    """The Markdown page; `pictures` are names of files in docs/images, by group."""
    protocol = results.protocol
    lines = [
        "# The study on the embedded world: figures",
        "",
        "[Findings](study.md), in words. What was decided beforehand: [bench/study](../bench/study/README.md).",
        "",
        "    OMP_NUM_THREADS=1 sqdf-fast compare --protocol bench/study/protocol.yaml --output runs/study --jobs 2",
        "    python bench/study/record.py runs/study",
        "",
        f"{protocol.budget} UNet evaluations a run, seeds {', '.join(map(str, protocol.seeds))}. In brackets 95 %",
        "bootstrap intervals, over seeds and held-out prompts where single prompts have scores, else over seeds.",
        ", ".join(f"{name} {value}" for name, value in results.environment.items()) + ".",
        "",
        *(f"- {line}" for line in verdict(results)),
    ]
    for group in results.groups:
        lines += ["", f"## Ablation: {label(group)}" if group else "## Methods"]
        shown = pictures.get(group, ())
        lines += [text for name in shown for text in ("", f"![{Path(name).stem.replace('_', ' ')}](images/{name})")]
        if results.duels_of(group):
            lines += ["", f"{duel_sentence(results, group)}:", "", *table(*duel_table(results, group))]
        if sentence := level_sentence(results, group):
            lines += ["", f"{sentence}:", "", *table(*equal_table(results, group))]
        lines += ["", "At the end of training:", "", *table(*end_table(results, group))]
    lines += ["", "## Tuning", "", tuning_sentence(results), ""]
    lines += table(*tuning_table(results))
    heads, rows = missing_table(results)
    if rows:
        lines += ["", "## Runs that are missing", "", *table(heads, rows)]
    return "\n".join([*lines, ""])


def record(folder: Path, docs: Path) -> Results:
    """Write page, figures and pictures of the comparison in `folder`. Raises UserError."""
    results = Comparison(stored_protocol(folder), folder).report()
    shown: dict[str, list[str]] = {}
    with disk_errors(docs):
        (docs / "images").mkdir(parents=True, exist_ok=True)
        for group in results.groups:
            for name, plot in PICTURES.get(group, {}).items():
                if (path := folder / "plots" / plot).exists():
                    shutil.copyfile(path, docs / "images" / name)
                    shown.setdefault(group, []).append(name)
        text = page(results, shown)
        (docs / "study_results.md").write_text(text, encoding="utf-8")
        figures = json.dumps(as_dict(results, folder), separators=(",", ":"))
        (docs / "study_results.json").write_text(figures + "\n", encoding="utf-8")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args(arguments)
    try:
        results = record(given.folder, given.docs)
    except UserError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    print("\n".join(verdict(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
