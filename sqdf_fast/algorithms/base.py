"""The interface of a fine-tuning algorithm: the samples it needs, and the gradient of its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sqdf_fast.config import Config
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.noise import Stream, generator, sample_seeds
from sqdf_fast.engine.runtime import Runtime


class Algorithm(ABC):
    """One way to fine-tune the policy. An optimizer step is ``collect`` and then ``accumulate``.

    Every random number derives from the run's seed and the numbers of step and collection, so that a retried step or a
    resumed run repeats itself.

    Args:
        config: of the run; runtime: samples and scores of the model as it is now; prompts: those it trains on.

    Class attributes:
        needs_gradient: whether the reward has to be differentiable.
        can_fall_back_to_staged: whether the staged executor can compute its gradient; else it is one joint graph.
    """

    needs_gradient: ClassVar[bool] = True
    can_fall_back_to_staged: ClassVar[bool] = False

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        self.config, self.runtime, self.prompts = config, runtime, list(prompts)
        self.backbone, self.family, self.guidance_scale = runtime.backbone, runtime.family, runtime.guidance_scale
        self.schedule, self.tables = runtime.sampler.schedule, runtime.sampler.tables
        if not self.can_fall_back_to_staged:
            runtime.use(runtime.execution.model_copy(update={"executor": "joint"}))

    def draw_prompts(self, number: int, count: int, *, each: int = 1) -> tuple[list[str], Tensor]:
        """Prompts and seeds of the run's collection ``number``, a function of the run's seed.

        Args:
            count: samples; each: consecutive samples that share a prompt, for advantages within a group.

        Returns:
            ``count`` prompts, drawn with replacement, and seeds [count] int64.
        """
        source = generator(self.config.seed, Stream.PROMPTS, number)
        choice = torch.randint(len(self.prompts), (-(-count // each),), generator=source)
        prompts = [self.prompts[i] for i in choice.tolist() for _ in range(each)][:count]
        return prompts, sample_seeds(self.config.seed, Stream.REFILL, number, count)

    @abstractmethod
    def collect(self, step: int) -> None:
        """Sample what optimizer step ``step`` (from 0) needs and does not have yet."""

    @abstractmethod
    def accumulate(self, step: int) -> StepResult:
        """Add the gradient of step ``step`` to the policy's parameters.

        A retry with gradients cleared and a smaller ``runtime.execution`` gives the same gradient up to rounding.

        Raises:
            UserError: invalid rewards.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors and JSON values."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from :meth:`state`. Raises KeyError or ValueError when it is of another configuration."""
        del tensors, values
