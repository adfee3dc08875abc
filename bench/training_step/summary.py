"""Tables and verdicts, from rows as they stand in a benchmark's extra_info and in a recorded file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from training_step.cases import PUBLISHED

Row = dict[str, Any]

MOST_FLOPS = 1.2
"""A whole training step with the staged executor may take so many times the FLOPs that it takes with the joint one."""

MOST_OFF = {"cpu": 0.02, "cuda": 0.05}
"""Relative error that the predicted peak of a step may have."""

HEADER = (
    *("way", "gradient error", "time", "spread", "x published", "FLOPs", "of published", "FLOP/s", "of the device's"),
    *("weights", "peak", "of published", "predicted"),
)


def title(row: Row) -> str:
    """What the rows of a problem have in common."""
    toy = ", toy sizes: no figure means anything" if row["toy"] else ""
    return f"training step of {row['size']}, batch {row['batch']}, {row['dtype']}, {row['device']}{toy}"


def cells(row: Row) -> list[str]:
    """A row as text under `HEADER`; the figures of one without parity are left out."""
    first = [row["implementation"], f"{row['gradient_error']:.1e}"]
    if row["fault"] is not None:
        return [*first, *["-"] * (len(HEADER) - 2)]
    return [
        *first,
        f"{row['median_seconds'] * 1e3:.0f} ms",
        f"{row['spread']:.0%}",
        _figure(row["times_published"], "{:.2f}"),
        f"{row['flops'] / 1e9:,.1f} G",
        _figure(row["flops_of_published"], "{:.2f}"),
        f"{row['flops_per_second'] / 1e9:,.0f} G",
        _figure(row["utilisation"], "{:.0%}"),
        size(row["resident_bytes"]),
        size(row["peak_bytes"]),
        _figure(row["peak_of_published"], "{:.2f}"),
        "-" if row["predicted_bytes"] is None else size(row["predicted_bytes"]),
    ]


def table(rows: Iterable[Row]) -> list[str]:
    """Aligned lines, one a way, under `HEADER`; then why a way has no figures, and what is known of stages."""
    rows = list(rows)
    content = [list(HEADER), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in content) for column in range(len(HEADER))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in content
    ]
    lines += [f"{row['implementation']}: no parity, no figures: {row['fault']}" for row in rows if row["fault"]]
    sound = [row for row in rows if row["fault"] is None]
    lines += [stages(row) for row in sound]
    missing = {row["unpredicted"] for row in sound if row["implementation"] != PUBLISHED and row["unpredicted"]}
    lines += [f"prediction: not available ({reason})" for reason in sorted(missing)]
    return lines


def stages(row: Row) -> str:
    """Peak bytes by stage, with the prediction of each in parentheses where there is one."""
    expected = row["predicted_stage_bytes"] or {}
    parts = [
        f"{name} {size(live)}" + (f" ({size(expected[name])})" if name in expected else "")
        for name, live in row["stage_bytes"].items()
    ]
    return f"{row['implementation']}, peak by stage: {', '.join(parts)}"


def verdicts(rows: Iterable[Row]) -> list[tuple[str, bool]]:
    """What a problem is held to: what is printed, and if it is met."""
    rows = [row for row in rows if row["fault"] is None]
    return [*_flops_verdicts(rows), *_prediction_verdicts(rows)]


def _flops_verdicts(rows: list[Row]) -> list[tuple[str, bool]]:
    """Whether a whole training step stays within `MOST_FLOPS`, at each replay ratio.

    Of the staged executor; what checkpointed adds is a price paid for memory and printed without a verdict.
    """
    found = []
    for row in rows:
        if row["implementation"] == "staged":
            for ratio, value in (row["training_step_of_joint"] or {}).items():
                met = value <= MOST_FLOPS
                text = (
                    f"whole training step of {row['size']}, sampling included, replay ratio {ratio}: staged takes "
                    f"{value:.3f} x the FLOPs of joint, at most {MOST_FLOPS:g}, {'met' if met else 'NOT MET'}"
                )
                found.append((text, met))
    return found


def _prediction_verdicts(rows: list[Row]) -> list[tuple[str, bool]]:
    """Whether the peak of every way that is planned was predicted within `MOST_OFF`."""
    found = []
    for row in rows:
        if row.get("predicted_bytes") is not None:
            real, off, most = row["peak_bytes"], row["predicted_bytes"] - row["peak_bytes"], MOST_OFF[row["device"]]
            met = abs(off) <= most * real
            text = (
                f"peak of {row['implementation']} on {row['size']}: predicted {off / real:+.1%}, "
                f"at most {most:.0%} off, {'met' if met else 'NOT MET'}"
            )
            found.append((text, met))
    return found


def whole_steps(rows: Iterable[Row]) -> list[str]:
    """FLOPs of a whole training step relative to the joint executor's, a line a way."""
    return [
        f"{row['implementation']}: whole training step "
        + ", ".join(f"{value:.3f} x joint at replay ratio {ratio}" for ratio, value in whole.items())
        for row in rows
        if row["fault"] is None and (whole := row["training_step_of_joint"])
    ]


def report(rows: list[Row]) -> list[str]:
    """All there is to say of a problem."""
    return [title(rows[0]), *table(rows), *whole_steps(rows), *(text for text, _ in verdicts(rows))]


def size(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
