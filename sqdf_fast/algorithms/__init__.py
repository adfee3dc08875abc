"""Fine-tuning algorithms on one engine: SQDF and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from sqdf_fast.algorithms.awm import Awm
from sqdf_fast.algorithms.base import Algorithm
from sqdf_fast.algorithms.ddpo import Ddpo
from sqdf_fast.algorithms.dpok import Dpok
from sqdf_fast.algorithms.draft import Draft, DraftKl
from sqdf_fast.algorithms.draft_lv import DraftLv
from sqdf_fast.algorithms.refl import Refl
from sqdf_fast.algorithms.sqdf import Sqdf
from sqdf_fast.config import Config
from sqdf_fast.engine.runtime import Runtime

__all__ = ["Algorithm", "Sqdf", "make_algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sqdf": Sqdf,
    "draft": Draft,
    "draft-kl": DraftKl,
    "draft-lv": DraftLv,
    "refl": Refl,
    "ddpo": Ddpo,
    "dpok": Dpok,
    "awm": Awm,
}


def make_algorithm(config: Config, runtime: Runtime, prompts: Sequence[str]) -> Algorithm:
    """The algorithm that ``config.algorithm`` names; prompts: those it trains on."""
    return ALGORITHMS[config.algorithm](config, runtime, prompts)
