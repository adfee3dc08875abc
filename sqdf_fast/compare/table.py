"""The results as text: a table at the end of training, one at equal reward, one of differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqdf_fast.compare.curves import Estimate
from sqdf_fast.compare.results import KNOWN, MethodSummary, PairwiseComparison, Results
from sqdf_fast.display import format_bytes, format_duration, text_table

COST_HEADS = ("UNet evals", "rewards", "time", "peak memory")
COMPARED_SCORES = ("true_reward", "attribute_accuracy", "alignment", "diversity", "kl")


def as_text(results: Results) -> str:
    """For a terminal, which is narrow: the rest of the scores is in the report."""
    shown = [name for name in results.metrics if name not in ("vendi", "vendi_all", "distance_to_base")]
    results = replace(results, metrics=shown)
    parts = []
    for group in results.groups:
        title = f"ablation of {group}" if group else "methods"
        parts.append(f"At the end of training: {title}\n{text_table(*end_table(results, group))}")
        sentence = level_sentence(results, group)
        if sentence:
            parts.append(f"{sentence}\n{text_table(*equal_table(results, group))}")
        if results.comparisons_of(group):
            parts.append(f"{comparison_sentence(results, group)}\n{text_table(*comparison_table(results, group))}")
    return "\n\n".join(parts)


def label(score: str) -> str:
    """A score's name for people."""
    if score.startswith("held_out_"):
        # A reward may say so in its own name.
        return f"held-out {score.removeprefix('held_out_').removesuffix('_held_out').replace('_', ' ')}"
    return "KL" if score == "kl" else score.replace("_", " ")


def end_table(results: Results, group: str) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: scores and costs at the last evaluation."""
    return _table(results, group, results.end)


def equal_table(results: Results, group: str) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: scores and costs where each curve reaches the group's level."""
    return _table(results, group, results.equal)


def level_sentence(results: Results, group: str) -> str:
    """At which proxy reward a group is compared, and why there."""
    level = results.levels.get(group)
    if level is None:
        return ""
    text = f"At equal proxy reward {level.value:.3f}, the best that every seed of {level.set_by} reached"
    if level.left_out:
        text += f" (not set by {', '.join(level.left_out)}, which gained less than a quarter of the best)"
    return text


def comparison_sentence(results: Results, group: str) -> str:
    """What a group's table of differences holds."""
    name, others = results.comparisons_of(group)[0].one, "variant" if group else "other method"
    return f"{name} minus each {others}, at the best proxy reward of the weaker of the two"


def comparison_table(results: Results, group: str) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: differences at the weaker side's best proxy reward, with intervals."""
    comparisons = results.comparisons_of(group)
    # What is not known by name is a judge that the user asked for.
    asked_for = [name for name in results.metrics if name not in KNOWN]
    scores = [name for name in (*COMPARED_SCORES, *asked_for) if any(name in one.differences for one in comparisons)]
    heads = ["against", "proxy reward", *map(label, scores), "UNet evals, ratio"]
    return heads, [_comparison_row(comparison, scores) for comparison in comparisons]


def tuning_sentence(results: Results) -> str:
    """By what the settings were chosen; without tuning, empty."""
    tuning = results.protocol.tuning
    if tuning is None:
        return ""
    ended = [row["kept"] for choice in results.choices.values() for row in choice.rows if row["reward"] is not None]
    # A score that this model has no judge for guards nothing.
    guarding = {name: share for name, share in tuning.keep.items() if not ended or any(name in kept for kept in ended)}
    kept = " and ".join(f"{share:.0%} of the base model's {label(name)}" for name, share in guarding.items())
    guard = f"of those that keep {kept}" if kept else "of all; nothing could be guarded"
    return f"Chosen: the highest last {label(tuning.reward)} {guard}. The true reward has no say."


def tuning_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: every trial, what it reached and kept, and which was chosen."""
    rows = []
    for name, choice in results.choices.items():
        for index, row in enumerate(choice.rows):
            reward = "-" if row["reward"] is None else f"{row['reward']:.3f}"
            kept = ", ".join(f"{label(score)} {share:.0%}" for score, share in row["kept"].items())
            state = "" if row["kept_enough"] else row.get("failure", "too little kept")
            if index == choice.index:
                state = f"chosen; {state}" if state else "chosen"
            rows.append([name, _settings(row["settings"]), reward, kept or "-", state])
    tuning = results.protocol.tuning
    return ["method", "settings", label(tuning.reward) if tuning else "", "kept", ""], rows


def missing_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows, one a reason: runs that did not end, and methods without settings to run with."""
    runs: dict[str, list[str]] = {}
    for run in results.runs:
        # The ablated method stands in its groups too.
        if run.group and run.name == results.protocol.ablated:
            continue
        for reason in dict.fromkeys(run.unfinished.values()):
            seeds = [str(seed) for seed, found in run.unfinished.items() if found == reason]
            runs.setdefault(reason, []).append(f"{run.name} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    without = [name for name, choice in results.choices.items() if choice.index is None]
    if without:
        runs["none of the tuning trials ended"] = without
    return ["why", "runs"], [[reason, "; ".join(names)] for reason, names in runs.items()]


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "as they are"


def _comparison_row(comparison: PairwiseComparison, scores: Sequence[str]) -> list[str]:
    ratio = comparison.costs.get("unet_evaluations")
    cells = [_with_interval(comparison.differences.get(name), "+") for name in scores]
    untrained = f" ({' and '.join(comparison.untrained)} before training)" if comparison.untrained else ""
    return [comparison.other + untrained, f"{comparison.level:.3f}", *cells, "-" if ratio is None else f"{ratio:.2f}"]


def _table(results: Results, group: str, standings: Sequence[MethodSummary]) -> tuple[list[str], list[list[str]]]:
    indices = results.of(group)
    scores = [name for name in results.metrics if any(name in standings[index].scores for index in indices)]
    rows = [_row(results, index, standings[index], scores) for index in indices]
    return ["method", *map(label, scores), *COST_HEADS], rows


def _row(results: Results, index: int, standing: MethodSummary, scores: Sequence[str]) -> list[str]:
    run = results.runs[index]
    if not run.curves:
        return [run.label, next(iter(run.unfinished.values()), "no run")]
    if not standing.complete:
        best = f"best {max(curve.best for curve in run.curves):.3f}"
        return [run.label, f"reached by {standing.reached} of {standing.seeds} seeds ({best})"]
    costs = standing.costs
    cells = [_with_interval(standing.scores.get(name)) for name in scores]
    seeds = f" ({len(run.curves)} seeds)" if run.unfinished else ""
    return [
        run.label + seeds + (" (before training)" if standing.untrained else ""),
        *cells,
        *_costs(costs, " an image" if run.training_free else ""),
        format_bytes(costs["peak_bytes"]) if "peak_bytes" in costs else "-",
    ]


def _costs(costs: Mapping[str, float], each: str) -> list[str]:
    seconds = costs.get("seconds")
    time = "-" if seconds is None else f"{format_duration(seconds)}{each}"
    counts = (_count(costs.get(name)) for name in ("unet_evaluations", "reward_evaluations"))
    return [*(count if count == "-" else count + each for count in counts), time]


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _with_interval(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return "-"
    form = f"{sign}.{_digits(found)}f"
    text = f"{found.mean:{form}}"
    return text if found.low is None else f"{text} [{found.low:{form}}, {found.high:{form}}]"


def _digits(found: Estimate) -> int:
    # KLs are small numbers.
    return 4 if 0 < abs(found.mean) < 0.05 else 3
