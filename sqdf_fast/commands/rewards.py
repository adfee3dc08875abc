"""The rewards that come with the package, as a table."""

from __future__ import annotations

from sqdf_fast.display import text_table
from sqdf_fast.rewards.catalogue import CATALOGUE, RewardCard

_HEADS = ("reward", "scores", "parameters", "download", "input", "prompt", "gradient", "licence")


def as_text() -> str:
    """A table of them, and how to name others."""
    table = text_table(_HEADS, [_row(name, card) for name, card in CATALOGUE.items()], left=range(len(_HEADS)))
    notes = [
        "",
        "Your own: module:function. Sums: aesthetic*1.0 + clip*0.5, with your own in them too.",
        "Without a gradient: --set algorithm=ddpo, dpok or awm. Weights and options: docs/rewards.md.",
    ]
    return "\n".join([table, *notes])


def _row(name: str, card: RewardCard) -> tuple[str, ...]:
    return (
        name,
        card.scores,
        _millions(card.parameters),
        f"{card.download:.2f} GB" if card.download else "none",
        f"{card.side} px" if card.side else "any",
        "yes" if card.reads_prompt else "no",
        "yes" if card.differentiable else "no",
        card.licence,
    )


def _millions(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.0f} M"
    return f"{number:,}".replace(",", " ") if number else "none"
