"""The cost of training, and the share of its limits that is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

from sqdf_fast.config import Limits
from sqdf_fast.engine.runtime import Runtime


@dataclass(frozen=True)
class Cost:
    """Cost of training without evaluations: network rows, seconds of sampling and steps, and images scored."""

    unet_evaluations: int = 0
    seconds: float = 0.0
    reward_evaluations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def share(self, limits: Limits) -> float:
        """The share of the tightest limit that is spent; 0 without limits."""
        spent = (self.unet_evaluations, limits.unet_evaluations), (self.seconds, limits.seconds)
        return max((value / limit for value, limit in spent if limit is not None), default=0.0)

    def totals(self) -> dict[str, float]:
        """The fields of a record in metrics.jsonl."""
        return {f"spent_{name}": value for name, value in asdict(self).items()}


def meter_cost(runtime: Runtime) -> Callable[[], Cost]:
    """A function that returns what the runtime has cost since this call."""
    started = time.monotonic()
    evaluations, scored = runtime.backbone.evaluations, runtime.reward_evaluations

    def cost() -> Cost:
        seconds = time.monotonic() - started
        return Cost(runtime.backbone.evaluations - evaluations, seconds, runtime.reward_evaluations - scored)

    return cost
