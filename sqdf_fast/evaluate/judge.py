"""What a judge is: one number about a set of images, with an interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.embedding import Embedding

Better = Literal["higher", "lower", "neither"]


class ImageSet:
    """Images of one model, and what of them several judges need.

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
        """Which images each distinct prompt has."""
        rows: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(self.prompts):
            rows[prompt].append(index)
        return dict(rows)

    def scores(self, score: Callable[[Tensor, Sequence[str]], Tensor], prompts: Sequence[str] | None = None) -> Tensor:
        """``score`` of every image, a batch at a time, float64 [N]; ``prompts`` in place of their own."""
        named = self.prompts if prompts is None else prompts
        parts = [
            score(self.images[start : start + self.batch_size], named[start : start + self.batch_size])
            for start in range(0, len(named), self.batch_size)
        ]
        return torch.cat([part.double().cpu() for part in parts])


@dataclass(frozen=True)
class Values:
    """Numbers and the prompt that each belongs to: one an image, or one a prompt."""

    numbers: list[float]
    prompts: list[str]

    @property
    def by_prompt(self) -> dict[str, float]:
        """The mean of each prompt's numbers."""
        found: dict[str, list[float]] = defaultdict(list)
        for prompt, number in zip(self.prompts, self.numbers, strict=True):
            found[prompt].append(number)
        return {prompt: sum(numbers) / len(numbers) for prompt, numbers in found.items()}


@dataclass(frozen=True)
class Measurement:
    """A number with its 95 % interval over prompts; no interval where resampling would say something wrong.

    Attributes:
        by_prompt: the mean of each prompt's values, in the order in which prompts first occur; None for no mean.
    """

    value: float
    low: float | None = None
    high: float | None = None
    by_prompt: dict[str, float] | None = None


class Judge:
    """Subclasses implement one method: ``values``, or ``measure`` where the number is no mean.

    Attributes:
        name: the record's key is ``eval_<name>``.
        better: which direction is good.
        network: is on the images' device while the judge works and on the CPU otherwise, so that it takes no memory
            from a training step.
    """

    name: str
    better: ClassVar[Better] = "higher"
    network: nn.Module | None = None

    @classmethod
    def load(cls, *, dtype: torch.dtype = torch.float32, **options: Any) -> Judge:
        """The judge with its weights, which are on the CPU.

        Args:
            dtype: for the networks of judges that can work in less than float32.
        """
        return cls(**options)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Told all prompts before any image; a judge that reads none does nothing."""

    def values(self, image_set: ImageSet) -> Values | None:
        """Numbers whose mean is the result; None where these images do not tell."""
        raise NotImplementedError

    def measure(self, image_set: ImageSet) -> Measurement | None:
        """The mean of the values and its bootstrap interval over prompts."""
        found = self.values(image_set)
        if found is None:
            return None
        mean = sum(found.numbers) / len(found.numbers)
        if not math.isfinite(mean):
            return Measurement(mean)
        return Measurement(mean, *bootstrap_interval(found.numbers, found.prompts), found.by_prompt)

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
        """As :meth:`measure`, for judges of any origin.

        Raises:
            UserError: the judge raises, or says something that is not finite. Running out of memory passes through.
        """
        try:
            with self.at(image_set.images.device):
                found = self.measure(image_set)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            shown = f"{len(image_set.images)} images {list(image_set.images.shape[1:])}"
            said = str(error).strip().splitlines()
            raise UserError(
                f"judge {self.name!r} raised {type(error).__name__}: {said[0] if said else ''}; it was given {shown} "
                f"on {image_set.images.device}"
            ) from error
        if found is not None and not math.isfinite(found.value):
            raise UserError(f"judge {self.name!r} said {found.value}; a judgement must be finite")
        return found


class ImageJudge(Judge):
    """Judges every image on its own: subclasses implement ``score``.

    Attributes:
        exchanges: other prompts of the set that an image is judged under where the level of chance is asked for.
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
