"""What every fine-tuning algorithm answers: which samples it needs, and the gradient of its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from sqdf_fast.backbone import Role
from sqdf_fast.config import Config
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.rollouts import Rollouts
from sqdf_fast.families import Conditioning


class Algorithm(ABC):
    """One way to fine-tune the policy. The trainer samples, steps, logs and saves alike for all of them.

    An optimizer step is ``collect`` and then ``accumulate``. Every random number derives from the run's seed and the
    numbers of step and collection, so that a step that is tried again, or a run that is resumed, repeats itself.

    Args:
        config: of the run; rollouts: samples and scores of the model as it is now.

    Class attributes:
        needs_gradient: whether the reward has to be differentiable.
        can_fall_back_to_staged: whether an out-of-memory fallback may replace the joint graph
            by the staged executor.
    """

    needs_gradient: ClassVar[bool] = True
    can_fall_back_to_staged: ClassVar[bool] = False

    def __init__(self, config: Config, rollouts: Rollouts) -> None:
        self.config, self.rollouts = config, rollouts
        self.backbone, self.schedule = rollouts.backbone, rollouts.sampler.schedule
        family = self.backbone.family
        self.tables = self.schedule.to(family.device, family.precision)
        self.guidance_scale = config.sampling.guidance_scale

    def output(self, role: Role, x: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output in a role at x_t, with the graph of what it depends on.

        Args:
            x: [B, ...]; index: [B] int64, positions in the schedule; both on the device.

        Returns:
            [2B, ...] ordered [unconditional; conditional], or [B, ...] without guidance: what the kernels take.
        """
        family = self.backbone.family
        unconditional = None if self.guidance_scale == 1 else family.encode([""])
        with self.backbone.role(role):
            return self.backbone.predict(x, self.tables.timesteps[index], conditioning, unconditional)

    @abstractmethod
    def collect(self, step: int) -> None:
        """Sample what optimizer step ``step`` (from 0) needs and what is not there yet."""

    @abstractmethod
    def accumulate(self, step: int) -> StepResult:
        """Add the gradient of step ``step`` to the policy's parameters.

        It may be called again for the same step, with gradients cleared and a smaller ``rollouts.execution``, and gives
        the same gradient beyond rounding.

        Raises:
            UserError: the reward returned something that is no reward.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors and JSON values."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from :meth:`state`. Raises KeyError or ValueError when it is of another configuration."""
        del tensors, values
