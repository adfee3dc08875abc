"""Each algorithm's own settings, and what it reads of the sections that algorithms share; docs/baselines.md."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sqdf_fast.config.section import Positive, Section

_COLLECTION = ("replay.refill", "replay.steps_per_refill")


class AlgorithmSettings(Section):
    """The settings that one algorithm alone reads."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Settings of shared sections that only some algorithms read, this one among them."""


class SqdfSettings(AlgorithmSettings):
    """SQDF."""

    reads: ClassVar[tuple[str, ...]] = (
        "objective.alpha",
        "objective.gamma",
        "objective.credit",
        "objective.lookahead",
        "objective.lookahead_steps",
        "objective.consistency_grid",
        "objective.mask_nonpositive",
        *_COLLECTION,
        *("replay.capacity", "replay.mode", "replay.store"),
        # All others run policy, decoder and reward as one graph.
        *("execution.executor", "execution.forward_batch_rows", "execution.backward_batch_rows"),
    )


class DraftSettings(AlgorithmSettings):
    """DRaFT-K (algorithm=draft); docs/baselines.md."""

    truncation: Positive = Field(1, description="K, the last denoising steps that carry a gradient")


class DraftKlSettings(DraftSettings):
    """DRaFT-K with a KL (algorithm=draft-kl); docs/baselines.md."""

    reads: ClassVar[tuple[str, ...]] = ("objective.alpha",)


class DraftLvSettings(AlgorithmSettings):
    """DRaFT-LV (algorithm=draft-lv); docs/baselines.md."""

    noises: Positive = Field(2, description="noised copies of each image that the loss averages over")


class ReflSettings(AlgorithmSettings):
    """ReFL (algorithm=refl); docs/baselines.md."""

    window: float = Field(0.25, gt=0, le=1, description="share of the last steps, one of which gets the gradient")
    margin: float | None = Field(
        None, description="the loss is relu(margin - r), published with 2 for ImageReward; default: -r"
    )


class PolicyGradientSettings(AlgorithmSettings):
    """What the algorithms without a gradient of the reward have in common."""

    reads: ClassVar[tuple[str, ...]] = _COLLECTION

    group: Positive = Field(1, description="samples per prompt whose rewards are compared; 1: all samples of a refill")
    timesteps: Positive | None = Field(
        None, description="steps of each trajectory in an update; default: all trainable steps"
    )
    clip_advantage: float = Field(5.0, gt=0, description="advantages are clipped to +- this")


class DdpoSettings(PolicyGradientSettings):
    """DDPO (algorithm=ddpo); docs/baselines.md."""

    clip_range: float = Field(1e-4, gt=0, description="the probability ratio is clipped to 1 +- this")


class DpokSettings(DdpoSettings):
    """DPOK (algorithm=dpok); docs/baselines.md."""

    reads: ClassVar[tuple[str, ...]] = (*_COLLECTION, "objective.alpha")


class AwmSettings(PolicyGradientSettings):
    """Advantage weighted matching (algorithm=awm); docs/baselines.md."""

    reads: ClassVar[tuple[str, ...]] = (*_COLLECTION, "objective.alpha")

    matching: Literal["uniform", "ghuber"] = Field(
        "uniform", description="the mean square itself, or its fourth root times the time (published program)"
    )
    clip_range: float = Field(1.0, gt=0, description="exp(fall of the matching loss) is clipped to 1 +- this")


ALGORITHM_SETTINGS: dict[str, type[AlgorithmSettings]] = {
    "sqdf": SqdfSettings,
    "draft": DraftSettings,
    "draft-kl": DraftKlSettings,
    "draft-lv": DraftLvSettings,
    "refl": ReflSettings,
    "ddpo": DdpoSettings,
    "dpok": DpokSettings,
    "awm": AwmSettings,
}
"""The settings class of each algorithm. The section of its settings is its name, with "_" for "-"."""


def readers(key: str) -> tuple[str, ...]:
    """The algorithms that read a setting, by its dotted key."""
    section, _, name = key.partition(".")
    table = ALGORITHM_SETTINGS.items()
    own = tuple(
        algorithm for algorithm, kind in table if section == section_of(algorithm) and name in kind.model_fields
    )
    return own or tuple(algorithm for algorithm, kind in table if key in kind.reads) or tuple(ALGORITHM_SETTINGS)


def section_of(algorithm: str) -> str:
    """The name of the section with an algorithm's own settings."""
    return algorithm.replace("-", "_")
