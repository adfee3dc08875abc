"""What training costs, and how much of its limits is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sqdf_fast.config import Limits
from sqdf_fast.engine.runtime import Runtime


@dataclass(frozen=True)
class Cost:
    """What training has cost, evaluations apart.

    Attributes:
        unet_evaluations: rows that went through the network; seconds: of sampling and steps.
        reward_evaluations: images that the reward scored.
    """

    unet_evaluations: int = 0
    seconds: float = 0.0
    reward_evaluations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.unet_evaluations + other.unet_evaluations,
            self.seconds + other.seconds,
            self.reward_evaluations + other.reward_evaluations,
        )

    def share(self, limits: Limits) -> float:
        """The share of the tightest limit that is spent; 0 without limits."""
        shares = [0.0]
        if limits.unet_evaluations is not None:
            shares.append(self.unet_evaluations / limits.unet_evaluations)
        if limits.seconds is not None:
            shares.append(self.seconds / limits.seconds)
        return max(shares)

    def totals(self) -> dict[str, float]:
        """The fields of a record in metrics.jsonl."""
        return {f"spent_{name}": value for name, value in asdict(self).items()}


def meter_cost(runtime: Runtime) -> Callable[[], Cost]:
    """A function that returns what the runtime has cost since this call."""
    started = time.monotonic()
    evaluations, scored = runtime.backbone.evaluations, runtime.reward_evaluations

    def cost() -> Cost:
        return Cost(
            runtime.backbone.evaluations - evaluations,
            time.monotonic() - started,
            runtime.reward_evaluations - scored,
        )

    return cost
