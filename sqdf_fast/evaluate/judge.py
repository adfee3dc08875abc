"""What a judge is: one number about a set of images, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError, describe
from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.embedding import Embedding

Item = TypeVar("Item")
Better = Literal["higher", "lower", "neither"]


class ImageSet:
    """Images of one model, and what several judges need of them.

    Args:
        images: float [N, 3, H, W] in [0, 1].
        prompts: N prompts; many judges need prompts that occur more than once.
        embedding: the space in which images are compared.
        batch_size: images judged at once.
        base: embeddings [N, F] of the base model's images of the same prompts and seeds, in the same order.
    """

    def __init__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        embedding: Embedding,
        batch_size: int = 16,
        base: Tensor | None = None,
    ) -> None:
        self.images, self.prompts = images, list(prompts)
        self.embedding, self.batch_size, self.base = embedding, batch_size, base

    @cached_property
    def embeddings(self) -> Tensor:
        """Float64 [N, F] on the CPU."""
        return torch.cat([self.embedding(batch) for batch in self.images.split(self.batch_size)])

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """Positions of each distinct prompt's images."""
        return _grouped(self.prompts, range(len(self.prompts)))

    def scores(self, score: Callable[[Tensor, Sequence[str]], Tensor], prompts: Sequence[str] | None = None) -> Tensor:
        """``score`` of every image, a batch at a time, float64 [N]; ``prompts`` in place of their own."""
        named, size = self.prompts if prompts is None else prompts, self.batch_size
        starts = range(0, len(named), size)
        return torch.cat([score(self.images[i : i + size], named[i : i + size]).double().cpu() for i in starts])


@dataclass(frozen=True)
class Values:
    """Numbers, one an image or one a prompt, and the prompt of each."""

    numbers: list[float]
    prompts: list[str]

    @property
    def by_prompt(self) -> dict[str, float]:
        """The mean of each prompt's numbers."""
        grouped = _grouped(self.prompts, self.numbers)
        return {prompt: sum(numbers) / len(numbers) for prompt, numbers in grouped.items()}


@dataclass(frozen=True)
class Measurement:
    """A number with its 95 % interval over prompts; no interval where resampling would mislead.

    Attributes:
        by_prompt: mean of each prompt's values, in the order in which prompts first occur; None if not a mean.
    """

    value: float
    low: float | None = None
    high: float | None = None
    by_prompt: dict[str, float] | None = None


class Judge:
    """Subclasses implement one method: ``values``, or ``measure`` where the number is not a mean.

    Attributes:
        name: the record's key is ``eval_<name>``.
        better: which direction is good.
        network: on the images' device while the judge works, otherwise on the CPU, out of a training step's memory.
    """

    name: str
    better: ClassVar[Better] = "higher"
    network: nn.Module | None = None

    @classmethod
    def load(cls, *, dtype: torch.dtype = torch.float32, **options: Any) -> Judge:
        """The judge with its weights on the CPU; ``dtype`` is for networks that can work in less than float32."""
        return cls(**options)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Take all prompts before any image; a judge that reads none does nothing."""

    def values(self, image_set: ImageSet) -> Values | None:
        """Numbers whose mean is the result; None where these images do not determine it."""
        raise NotImplementedError

    def measure(self, image_set: ImageSet) -> Measurement | None:
        """The mean of the values and its bootstrap interval over prompts."""
        values = self.values(image_set)
        if values is None:
            return None
        mean = sum(values.numbers) / len(values.numbers)
        if not math.isfinite(mean):
            return Measurement(mean)
        return Measurement(mean, *bootstrap_interval(values.numbers, values.prompts), values.by_prompt)

    @contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        """The judge's network on ``device`` inside the block, on the CPU afterwards."""
        if self.network is None:
            yield
            return
        try:
            self.network.to(device)
            yield
        finally:
            self.network.to("cpu")

    @torch.no_grad()
    def __call__(self, image_set: ImageSet) -> Measurement | None:
        """As :meth:`measure`, with checks.

        Raises:
            UserError: the judge raises, or its number is not finite. Running out of memory passes through.
        """
        images = image_set.images
        try:
            with self.at(images.device):
                measurement = self.measure(image_set)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"judge {self.name!r} raised {describe(error)}; it was given {len(images)} images "
                f"{list(images.shape[1:])} on {images.device}"
            ) from error
        if measurement is not None and not math.isfinite(measurement.value):
            raise UserError(f"judge {self.name!r} returned {measurement.value}; a judgement must be finite")
        return measurement


class ImageJudge(Judge):
    """Judges every image on its own: subclasses implement ``score``.

    Attributes:
        exchanges: other prompts that each image is scored under for the chance level.
    """

    exchanges: ClassVar[int] = 8

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of float [B, 3, H, W] in [0, 1] and B prompts, [B]."""
        raise NotImplementedError

    def values(self, image_set: ImageSet) -> Values:
        return Values(image_set.scores(self.score).tolist(), image_set.prompts)


class PromptJudge(Judge):
    """Judges the images of one prompt together: subclasses implement ``of_prompt``."""

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        """Of the images in ``rows``, two or more of the same prompt."""
        raise NotImplementedError

    def values(self, image_set: ImageSet) -> Values | None:
        several = {prompt: rows for prompt, rows in image_set.rows.items() if len(rows) > 1}
        if not several:
            return None
        return Values([self.of_prompt(image_set, rows) for rows in several.values()], list(several))


def _grouped(prompts: Sequence[str], items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for prompt, item in zip(prompts, items, strict=True):
        groups.setdefault(prompt, []).append(item)
    return groups
