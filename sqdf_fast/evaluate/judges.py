"""Which judges a model gets: its own, those asked for by name, and rewards held out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError, did_you_mean
from sqdf_fast.evaluate.distance import KernelDistance
from sqdf_fast.evaluate.diversity import EmbeddingDiversity, Vendi, VendiOfAll
from sqdf_fast.evaluate.embedding import Embedding, embedding_of
from sqdf_fast.evaluate.judge import Better, ImageJudge, Judge
from sqdf_fast.evaluate.reward_judges import held_out_judge
from sqdf_fast.rewards import Reward
from sqdf_fast.rewards.registry import import_attribute

_REGISTERED = {
    "clip": "sqdf_fast.evaluate.reward_judges:ClipAlignment",
    "lpips": "sqdf_fast.evaluate.perceptual:LpipsDiversity",
    "dreamsim": "sqdf_fast.evaluate.perceptual:DreamSimDiversity",
    "frechet": "sqdf_fast.evaluate.distance:FrechetDistance",
}


class Judges:
    """Several judges and the embedding that they share.

    Raises:
        UserError: two judges of the same name.
    """

    def __init__(self, judges: Sequence[Judge], embedding: Embedding) -> None:
        self.embedding = embedding
        self.by_name = {judge.name: judge for judge in judges}
        for judge in judges:
            if self.by_name[judge.name] is not judge:
                raise UserError(
                    f"two judges are called {judge.name!r}; leave one out "
                    "(the embedded world has an alignment judge of its own)"
                )

    @property
    def diversity_measure(self) -> str | None:
        """What the judge called diversity compares, in a few words."""
        judge = self.by_name.get("diversity")
        return None if judge is None else getattr(judge, "description", self.embedding.description)

    @property
    def better(self) -> dict[str, Better]:
        """Which direction is good, by judge."""
        return {name: judge.better for name, judge in self.by_name.items()}

    @torch.no_grad()
    def alignment(self, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """How well each image fits its prompt, [B]; None without an alignment judge of images.

        Raises:
            UserError: a prompt that the judge cannot read.
        """
        judge = self.by_name.get("alignment")
        if not isinstance(judge, ImageJudge):
            return None
        with judge.at(images.device):
            return judge.score(images, prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Give the judges all prompts of the run, so that they can free what only serves new ones."""
        for judge in self.by_name.values():
            judge.encode_prompts(prompts)

    @torch.no_grad()
    def embed(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Embeddings [N, F] of images, such as the base model's."""
        return torch.cat([self.embedding(batch) for batch in images.split(batch_size)])


def available_judges() -> tuple[str, ...]:
    """Names that :func:`load_judges` knows beside ``module:Class``."""
    return tuple(_REGISTERED)


def load_judges(
    model: str,
    reward: Reward,
    names: Sequence[str] = (),
    held_out: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Judges:
    """The judges of ``model``: those of the embedded world for "shapes", embeddings for every other; and more.

    Args:
        reward: the one that training maximizes, whose features are the embedding of other models.
        names: registered judges, or ``module:Class`` of a subclass of :class:`Judge`.
        held_out: rewards, registered or ``module:function``, that training does not see.
        options: keywords for the judge or the held-out reward of that name.
        dtype: dtype of their networks, where they can work in less than float32.

    Raises:
        UserError: an unknown name, or a judge or reward that cannot be loaded.
    """
    given = options or {}
    if model == "shapes":
        from sqdf_fast.evaluate.shapes import ShapesEmbedding, shapes_judges
        from sqdf_fast.shapes import load_judge

        networks = load_judge()
        own: list[Judge]
        embedding: Embedding
        own, embedding = shapes_judges(networks), ShapesEmbedding(networks)
    else:
        own, embedding = [EmbeddingDiversity(), Vendi(), VendiOfAll()], embedding_of(reward)
    more = [find_judge(name).load(dtype=dtype, **given.get(name, {})) for name in names]
    rewards = [held_out_judge(spec, dtype=dtype, **given.get(spec, {})) for spec in held_out]
    return Judges([*own, KernelDistance(), *more, *rewards], embedding)


def find_judge(name: str) -> type[Judge]:
    """The class that ``name`` means; no weights are read. Raises UserError if unknown."""
    address = _REGISTERED.get(name, name)
    if ":" not in address:
        raise UserError(
            f"judge {name!r} is unknown; {did_you_mean(name, _REGISTERED)}allowed: {', '.join(_REGISTERED)}, "
            "or module:Class of your own"
        )
    judge = import_attribute(address, "judge")
    if not (isinstance(judge, type) and issubclass(judge, Judge)):
        raise UserError(
            f"judge {name!r} is not a subclass of sqdf_fast.evaluate.Judge; write one, see docs/evaluation.md"
        )
    return judge
