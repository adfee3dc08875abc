"""Over-optimization: the trained reward still rises while what training does not see falls.

A pure function of the evaluation records: a resumed run decides as an uninterrupted one. The rule and the origin
of its constants: docs/monitor.md. The true reward of the embedded world, which no user has, plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

PROXY = "eval_proxy_reward"
HELD_OUT = "eval_held_out_"
# Evaluations in a row that must say the same.
PERSISTENCE = 2
# Share of its best value that a judge may lose. Rewards have no zero, so only their intervals count.
TOLERANCE = {"eval_alignment": 0.05, "eval_attribute_accuracy": 0.05, "eval_diversity": 0.5}


@dataclass(frozen=True)
class Turn:
    """A judge that fell while the proxy rose.

    Attributes:
        key: key of the evaluation record; best_step: step of the judge's best value.
        best, now: its best and its last value.
    """

    key: str
    best_step: int
    best: float
    now: float

    @property
    def name(self) -> str:
        """The judge's name in messages."""
        if self.key.startswith(HELD_OUT):
            return f"held-out reward {self.key.removeprefix(HELD_OUT)}"
        return self.key.removeprefix("eval_").replace("_", " ")


@dataclass(frozen=True)
class Alarm:
    """Over-optimization, seen at an evaluation.

    Attributes:
        step: step of that evaluation; best_step: of the last one at which no judge was below its best yet.
        proxy: trained reward at best_step and at step; kl: KL at both, None where it was not measured.
        turns: the judges that fell, at least one.
    """

    step: int
    best_step: int
    proxy: tuple[float, float]
    kl: tuple[float, float] | None
    turns: tuple[Turn, ...]

    @property
    def reason(self) -> str:
        """One sentence."""
        fallen = ", ".join(f"{turn.name} fell from {turn.best:.4g} to {turn.now:.4g}" for turn in self.turns)
        at = f"step {self.best_step}"
        if self.kl is not None:
            at += f" (KL {self.kl[0]:.3g}, now {self.kl[1]:.3g})"
        return f"since {at} the trained reward rose from {self.proxy[0]:.4g} to {self.proxy[1]:.4g} while {fallen}"

    def record(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        judges = [turn.key.removeprefix("eval_") for turn in self.turns]
        steps = {"step": self.step, "best_step": self.best_step}
        return {"kind": "alarm", **steps, "judges": judges, "reason": self.reason}


def watched(evaluations: Sequence[Record]) -> list[str]:
    """Keys of the judges that the monitor watches and that have values in these records."""
    keys = dict.fromkeys(key for record in evaluations for key in record)
    judges = [key for key in keys if key in TOLERANCE or _is_held_out(key)]
    return [key for key in judges if any(record.get(key) is not None for record in evaluations)]


def is_good(evaluations: Sequence[Record]) -> bool:
    """Whether no judge is below its best at the last evaluation: a point that a later alarm may return to."""
    last = evaluations[-1]
    judged = [key for key in watched(evaluations) if last.get(key) is not None]
    return not any(_fell(_best(evaluations, key), last, key) for key in judged)


def check(evaluations: Sequence[Record]) -> Alarm | None:
    """The alarm at the last evaluation, given those before it; None without over-optimization.

    Args:
        evaluations: records of kind "evaluation" in order, of the same prompts and seeds, the first the base model's.
    """
    turns = [turn for key in watched(evaluations) if (turn := _turn(evaluations, key)) is not None]
    if not turns:
        return None
    last = evaluations[-1]
    # The first evaluation is its own best.
    count = next(count for count in range(len(evaluations), 0, -1) if is_good(evaluations[:count]))
    best = evaluations[count - 1]
    kl = (best.get("eval_kl"), last.get("eval_kl"))
    return Alarm(
        step=int(last["step"]),
        best_step=int(best["step"]),
        proxy=(best[PROXY], last[PROXY]),
        kl=None if kl[0] is None or kl[1] is None else (kl[0], kl[1]),
        turns=tuple(turns),
    )


def new_alarm(evaluations: Sequence[Record]) -> Alarm | None:
    """As :func:`check`, but None if the evaluation before the last raised it already: an alarm is raised once."""
    return check(evaluations) if check(evaluations[:-1]) is None else None


def _is_held_out(key: str) -> bool:
    return key.startswith(HELD_OUT) and not key.endswith(("_low", "_high"))


def _best(evaluations: Sequence[Record], key: str) -> Record:
    known = [record for record in evaluations if record.get(key) is not None]
    return max(known, key=lambda record: (record[key], record["step"]))


def _turn(evaluations: Sequence[Record], key: str) -> Turn | None:
    """The judge has been below its best in each of the last evaluations, and the proxy above its value there."""
    known = [record for record in evaluations if record.get(key) is not None]
    earlier, latest = known[:-PERSISTENCE], known[-PERSISTENCE:]
    if not earlier or known[-1] is not evaluations[-1]:
        return None
    best = _best(earlier, key)
    if not all(_fell(best, record, key) and record[PROXY] > best[PROXY] for record in latest):
        return None
    return Turn(key, int(best["step"]), best[key], latest[-1][key])


def _fell(best: Record, now: Record, key: str) -> bool:
    """Whether the intervals lie apart, and the judge has lost more than it may."""
    ends = best.get(f"{key}_low"), now.get(f"{key}_high")
    if ends[0] is None or ends[1] is None:
        return False
    # Images of a single prompt have intervals without width, which mean nothing.
    has_width = ends[0] < best[key] or ends[1] > now[key]
    return has_width and ends[1] < ends[0] and best[key] - now[key] > TOLERANCE.get(key, 0.0) * abs(best[key])
