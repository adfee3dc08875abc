"""The results as text: tables at the end of training, at equal reward, and of differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqdf_fast.compare.curves import Estimate
from sqdf_fast.compare.results import KNOWN, MethodSummary, Results
from sqdf_fast.display import format_bytes, format_duration, text_table

# Column heads and rows; a row that is too short is a name and a remark.
Table = tuple[list[str], list[list[str]]]

COST_COLUMNS = {
    "unet_evaluations": ("UNet evals", "{:,.0f}".format),
    "reward_evaluations": ("rewards", "{:,.0f}".format),
    "seconds": ("time", format_duration),
    "peak_bytes": ("peak memory", format_bytes),
}
COMPARED_SCORES = ("true_reward", "attribute_accuracy", "alignment", "diversity", "kl")


def as_text(results: Results) -> str:
    """The tables for a terminal, without the scores that only the report has room for."""
    shown = [name for name in results.metrics if name not in ("vendi", "vendi_all", "distance_to_base")]
    results = replace(results, metrics=shown)
    parts = []
    for group in results.groups:
        for kind, (sentence, table) in reversed(group_tables(results, group).items()):
            title = "" if kind != "end" else f": ablation of {group}" if group else ": methods"
            parts.append(f"{sentence}{title}\n{text_table(*table)}")
    return "\n\n".join(parts)


def label(score: str) -> str:
    """A score's display name."""
    if score.startswith("held_out_"):
        # The name of a reward may say so too.
        return f"held-out {score.removeprefix('held_out_').removesuffix('_held_out').replace('_', ' ')}"
    return "KL" if score == "kl" else score.replace("_", " ")


def group_tables(results: Results, group: str) -> dict[str, tuple[str, Table]]:
    """What a group's tables show, and the tables: "differences" and "equal", if there are any, and "end".

    Differences are taken at the weaker side's best proxy reward; "equal" is at the group's level.
    """
    tables: dict[str, tuple[str, Table]] = {}
    if comparisons := results.comparisons_of(group):
        others = "variant" if group else "other method"
        sentence = f"{comparisons[0].one} minus each {others}, at the best proxy reward of the weaker of the two"
        tables["differences"] = sentence, _comparison_table(results, group)
    if level := results.levels.get(group):
        sentence = f"At equal proxy reward {level.value:.3f}, the best that every seed of {level.set_by} reached"
        if level.left_out:
            sentence += f" (not set by {', '.join(level.left_out)}, which gained less than a quarter of the best)"
        tables["equal"] = sentence, _summary_table(results, group, results.equal)
    tables["end"] = "At the end of training", _summary_table(results, group, results.end)
    return tables


def tuning_sentence(results: Results) -> str:
    """How the settings were chosen; empty without tuning."""
    tuning = results.protocol.tuning
    if tuning is None:
        return ""
    ended = [row["kept"] for choice in results.choices.values() for row in choice.rows if row["reward"] is not None]
    # A score that this model has no judge for guards nothing.
    guarding = {name: share for name, share in tuning.keep.items() if not ended or any(name in kept for kept in ended)}
    kept = " and ".join(f"{share:.0%} of the base model's {label(name)}" for name, share in guarding.items())
    guard = f"of those that keep {kept}" if kept else "of all; nothing could be guarded"
    return f"Chosen: the highest last {label(tuning.reward)} {guard}. The true reward has no say."


def tuning_table(results: Results) -> Table:
    """Every trial, what it reached and kept, and which was chosen."""
    rows = []
    for name, choice in results.choices.items():
        for index, row in enumerate(choice.rows):
            settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "as they are"
            reward = "-" if row["reward"] is None else f"{row['reward']:.3f}"
            kept = ", ".join(f"{label(score)} {share:.0%}" for score, share in row["kept"].items()) or "-"
            state = "" if row["kept_enough"] else row.get("failure", "too little kept")
            if index == choice.index:
                state = f"chosen; {state}" if state else "chosen"
            rows.append([name, settings, reward, kept, state])
    tuning = results.protocol.tuning
    return ["method", "settings", label(tuning.reward) if tuning else "", "kept", ""], rows


def missing_table(results: Results) -> Table:
    """Runs that did not end, and methods without settings, one row per reason."""
    runs: dict[str, list[str]] = {}
    for run in results.runs:
        # The ablated method is in its own groups too.
        if run.group and run.name == results.protocol.ablated:
            continue
        for reason in dict.fromkeys(run.unfinished.values()):
            seeds = [str(seed) for seed, found in run.unfinished.items() if found == reason]
            runs.setdefault(reason, []).append(f"{run.name} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    if without := [name for name, choice in results.choices.items() if choice.index is None]:
        runs["none of the tuning trials ended"] = without
    return ["why", "runs"], [[reason, "; ".join(names)] for reason, names in runs.items()]


def _comparison_table(results: Results, group: str) -> Table:
    comparisons = results.comparisons_of(group)
    # Scores beyond the known ones are of judges that the user chose.
    scores = [
        name
        for name in (*COMPARED_SCORES, *(name for name in results.metrics if name not in KNOWN))
        if any(name in one.differences for one in comparisons)
    ]
    rows = []
    for one in comparisons:
        untrained = f" ({' and '.join(one.untrained)} before training)" if one.untrained else ""
        ratio = f"{one.costs['unet_evaluations']:.2f}" if "unet_evaluations" in one.costs else "-"
        cells = [_interval(one.differences.get(name), "+") for name in scores]
        rows.append([one.other + untrained, f"{one.level:.3f}", *cells, ratio])
    return ["against", "proxy reward", *map(label, scores), "UNet evals, ratio"], rows


def _summary_table(results: Results, group: str, summaries: Sequence[MethodSummary]) -> Table:
    indices = results.of(group)
    scores = [name for name in results.metrics if any(name in summaries[index].scores for index in indices)]
    rows = []
    for run, summary in ((results.runs[index], summaries[index]) for index in indices):
        if not run.curves:
            rows.append([run.label, next(iter(run.unfinished.values()), "no run")])
        elif not summary.complete:
            best = max(curve.best for curve in run.curves)
            rows.append([run.label, f"reached by {summary.reached} of {summary.seeds} seeds (best {best:.3f})"])
        else:
            seeds = f" ({len(run.curves)} seeds)" if run.unfinished else ""
            costs = {name: COST_COLUMNS[name][1](cost) for name, cost in summary.costs.items()}
            if run.training_free:
                costs = {name: cost + " an image" * (name != "peak_bytes") for name, cost in costs.items()}
            rows.append(
                [
                    run.label + seeds + " (before training)" * summary.untrained,
                    *(_interval(summary.scores.get(name)) for name in scores),
                    *(costs.get(name, "-") for name in COST_COLUMNS),
                ]
            )
    return ["method", *map(label, scores), *(head for head, _ in COST_COLUMNS.values())], rows


def _interval(found: Estimate | None, sign: str = "") -> str:
    """ "mean [low, high]"; four digits for numbers as small as KLs."""
    if found is None:
        return "-"
    form = f"{sign}.{4 if 0 < abs(found.mean) < 0.05 else 3}f"
    text = f"{found.mean:{form}}"
    return text if found.low is None else f"{text} [{found.low:{form}}, {found.high:{form}}]"
