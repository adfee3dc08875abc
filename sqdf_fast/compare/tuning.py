"""Choice of the trial whose settings a method is reported with. The true reward has no say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqdf_fast.compare.curves import Curve
from sqdf_fast.compare.protocol import Tuning

# Why a run that ended cannot be compared.
UNJUDGED = "it has no evaluation after training"


class Trial(NamedTuple):
    """One trial of one method; ``curve`` is None if the run failed, for the one-line reason ``failure``."""

    settings: dict[str, Any]
    curve: Curve | None
    failure: str = ""


@dataclass(frozen=True)
class Choice:
    """The index of the chosen trial, None if no trial ended, and a row of results per trial."""

    index: int | None
    rows: list[dict[str, Any]]


def choose(trials: Sequence[Trial], tuning: Tuning) -> Choice:
    """The trial with the highest last reward among those that keep the guarded scores.

    If no trial keeps enough, the one that keeps the largest share of its worst guarded score.
    """
    rows = [_row(trial, tuning) for trial in trials]
    kept = [i for i, row in enumerate(rows) if row["kept_enough"]]
    if kept:
        return Choice(max(kept, key=lambda i: rows[i]["reward"]), rows)
    ended = [i for i, row in enumerate(rows) if row["reward"] is not None]
    return Choice(max(ended, key=lambda i: rows[i]["worst_kept"], default=None), rows)


def _row(trial: Trial, tuning: Tuning) -> dict[str, Any]:
    """Settings, reward, share kept of each guarded score, and whether that is enough."""
    row: dict[str, Any] = {"settings": trial.settings, "reward": None, "kept": {}, "kept_enough": False}
    if trial.curve is None or len(trial.curve.points) < 2 or tuning.reward not in trial.curve.points[-1].scores:
        return row | {"failure": trial.failure or UNJUDGED}
    first, last = trial.curve.points[0].scores, trial.curve.points[-1].scores
    # A score that this model has no judge for cannot be guarded.
    kept = {name: last[name] / first[name] for name in tuning.keep if first.get(name) and name in last}
    return row | {
        "reward": last[tuning.reward],
        "kept": kept,
        "worst_kept": min((share / tuning.keep[name] for name, share in kept.items()), default=1.0),
        "kept_enough": all(share >= tuning.keep[name] for name, share in kept.items()),
    }
