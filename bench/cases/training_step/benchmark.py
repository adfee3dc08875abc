"""What does the gradient of a training step cost, the published way and ours: time, FLOPs, peak memory?"""

from __future__ import annotations

from harness import tables
from harness.benchmark import Benchmark, Choice, Group, Prepared, Row, Verdict, verdict
from harness.tables import Column, Table

from cases.training_step.problem import MODELS, PUBLISHED, WAYS, Problem, problem
from sqdf_fast.display import format_bytes

MOST_FLOPS = 1.2
"""A whole training step with the staged executor may take so many times the FLOPs that it takes with the joint one."""

MOST_OFF = {"cpu": 0.02, "cuda": 0.05}
"""Relative error that the predicted peak of a step may have."""


def group(problem: Problem) -> Group:
    fields = {
        "device": problem.device,
        "size": problem.model,
        "dtype": problem.dtype_name,
        "batch": problem.batch,
        "chunks": [problem.forward_batch_rows, problem.backward_batch_rows, problem.decode_images],
    }
    return Group(problem.id, WAYS, fields, problem)


def groups(choice: Choice) -> list[Group]:
    """The models chosen: by default the embedded one on a CPU, those of true size on CUDA."""
    models = choice.models or (MODELS[:1] if choice.device == "cpu" else MODELS[1:])
    return [group(problem(model, choice.device, choice.toy)) for model in models]


def prepare(group: Group, toy: bool) -> Prepared:
    # Only now: diffusers takes seconds, and collecting the other benchmarks should not wait for it.
    from cases.training_step import measure

    return measure.prepare(group.problem)


def notes(rows: list[Row]) -> list[str]:
    """Below the table: peak memory by stage, with the prediction in parentheses, and why a prediction is missing."""
    lines, missing = [], set()
    for row in (row for row in rows if row["fault"] is None):
        expected = row["predicted_stage_bytes"] or {}
        stages = (
            f"{name} {format_bytes(live)}" + (f" ({format_bytes(expected[name])})" if name in expected else "")
            for name, live in row["stage_bytes"].items()
        )
        lines.append(f"{row['implementation']}, peak by stage: {', '.join(stages)}")
        if row["implementation"] != PUBLISHED and row["unpredicted"]:
            missing.add(f"prediction: not available ({row['unpredicted']})")
    return [*lines, *sorted(missing)]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The targets of every way: FLOPs of a whole training step, and the predicted peak.

    FLOPs are the target of the staged executor; what checkpointing adds is a price paid for memory, without a target.
    """
    flops, peaks = [], []
    for row in rows:
        if row["op"] != "training_step" or row.get("fault"):
            continue
        by_ratio = row["training_step_of_joint"] if row["implementation"] == "staged" else None
        for ratio, value in (by_ratio or {}).items():
            text = (
                f"whole training step of {row['size']}, sampling included, replay ratio {ratio}: staged takes "
                f"{value:.3f} x the FLOPs of joint, at most {MOST_FLOPS:g}"
            )
            flops.append(verdict(text, value <= MOST_FLOPS))
        if row.get("predicted_bytes") is not None:
            real, most = row["peak_bytes"], MOST_OFF[row["device"]]
            off = row["predicted_bytes"] - real
            text = (
                f"peak of {row['implementation']} on {row['size']}: predicted {off / real:+.1%}, at most {most:.0%} off"
            )
            peaks.append(verdict(text, abs(off) <= most * real))
    return [*flops, *peaks]


COLUMNS = (
    Column("way", "implementation", text=True),
    Column("gradient error", "gradient_error", ".1e"),
    Column("time", "median_seconds", tables.duration),
    Column("spread", "spread", ".0%"),
    Column("x published", "times_published", ".2f"),
    Column("GFLOP", "flops", lambda count: f"{count / 1e9:,.1f}"),
    Column("of published", "flops_of_published", ".2f"),
    Column("GFLOP/s", "flops_per_second", lambda count: f"{count / 1e9:,.1f}"),
    Column("of best", "utilisation", ".0%"),
    Column("whole step, x joint", "training_step_of_joint", lambda by: "/".join(f"{x:.3f}" for x in by.values())),
    Column("weights", "resident_bytes", format_bytes),
    Column("peak", "peak_bytes", format_bytes),
    Column("of published", "peak_of_published", ".2f"),
    Column("predicted", "predicted_bytes", format_bytes),
)


def by_problem(rows: list[Row]) -> list[Table]:
    """A table a problem."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['size']}, {row['dtype']}, batch {row['batch']}:", []).append(row)
    return [tables.table(COLUMNS, own, title) for title, own in groups.items()]


BENCHMARK = Benchmark(
    name="training_step",
    page="training_step.md",
    groups=groups,
    prepare=prepare,
    columns=COLUMNS,
    tables=by_problem,
    verdicts=verdicts,
    title=lambda row: f"training step of {row['size']}, batch {row['batch']}, {row['dtype']}, {row['device']}",
    notes=notes,
)
