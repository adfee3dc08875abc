"""Weighted sums of rewards: ``aesthetic*1.0 + clip*0.5``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.checks import called

_EXAMPLE = "aesthetic*1.0 + clip*0.5 + my_rewards:pastel*-0.2"
_TERM = re.compile(
    r"\s*(?P<name>[^\W\d][\w.\-]*(?::\w+)?)\s*"
    r"(?:\*\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*)?(?P<end>\+|$)"
)


@dataclass(frozen=True)
class Term:
    """One reward of a sum: its name, or module:function, and its weight."""

    name: str
    weight: float = 1.0


def parse_sum(spec: str) -> list[Term]:
    """The terms of ``name [* weight] + ...``; whitespace is allowed, a weight may be left out for 1.

    Raises:
        UserError: anything else, a weight of 0, or a reward that occurs twice.
    """
    terms: list[Term] = []
    position, more = 0, True
    while more:
        match = _TERM.match(spec, position)
        if match is None:
            raise UserError(
                f"reward {spec!r}: cannot read {spec[position:].strip() or 'what follows the last +'!r}; "
                f"write NAME*WEIGHT + NAME*WEIGHT, e.g. {_EXAMPLE} (a weight may be negative, or left out for 1)"
            )
        terms.append(Term(match["name"], float(match["weight"] or 1)))
        position, more = match.end(), bool(match["end"])
    for index, term in enumerate(terms):
        if not term.weight or not math.isfinite(term.weight):
            raise UserError(
                f"reward {spec!r}: a weight of {term.weight:g} for {term.name}; give another, or leave it out"
            )
        if term.name in [other.name for other in terms[:index]]:
            raise UserError(f"reward {spec!r}: {term.name} occurs twice; add its weights up")
    return terms


def is_sum(spec: str) -> bool:
    """Whether ``spec`` is more than one reward's own name."""
    return "*" in spec or "+" in spec


def options_of(terms: Sequence[Term], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each term: ``clip.model`` is the option ``model`` of ``clip``; a single reward needs no name.

    Raises:
        UserError: an option that belongs to no term.
    """
    own: list[dict[str, Any]] = [{} for _ in terms]
    for key, value in options.items():
        owners = [index for index, term in enumerate(terms) if key.startswith(f"{term.name}.")]
        if owners:
            # The longest name: my.module:score before a reward "my".
            owner = max(owners, key=lambda index: len(terms[index].name))
            own[owner][key.removeprefix(f"{terms[owner].name}.")] = value
        elif len(terms) == 1:
            own[0][key] = value
        else:
            named = " or ".join(f"{term.name}.{key}" for term in terms)
            raise UserError(f"reward option {key!r}: say whose it is in the sum, {named}")
    return own


class WeightedSum(Reward):
    """r(x, c) = sum of w_i r_i(x, c); its features, for diversity, are those of the first part that has some.

    Args:
        name: name in reports; whitespace is left out.
        weights: one for each of the parts.
    """

    def __init__(self, name: str, parts: Sequence[Reward], weights: Sequence[float]) -> None:
        super().__init__()
        self.name = "".join(name.split())
        self.summands = nn.ModuleList(parts)
        self.weights = tuple(weights)
        self.differentiable = all(part.differentiable for part in parts)
        self.checkpointed_block_types = frozenset().union(*(part.checkpointed_block_types for part in parts))

    def parts(self) -> Sequence[Reward]:
        return [part for part in self.summands if isinstance(part, Reward)]

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        for part in self.parts():
            part.encode_prompts(prompts)

    def drop_text_tower(self) -> None:
        for part in self.parts():
            part.drop_text_tower()

    def features(self, images: Tensor) -> Tensor | None:
        for part in self.parts():
            if (features := part.features(images)) is not None:
                return features
        return None

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # Checked first: a part of the wrong shape would be broadcast.
        parts = zip(self.parts(), self.weights, strict=True)
        scores = [weight * called(part, images, prompts) for part, weight in parts]
        return sum(scores[1:], start=scores[0])
