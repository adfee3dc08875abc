"""What the executors have in common: the step's inputs and its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.module_groups import ModuleGroup, ModuleGroups
from sqdf_fast.families import Family
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.schedule import DenoisingSchedule, Lookahead

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, per sample and detached.

    Attributes:
        loss: [] of the whole batch; reward: [B].
        index: [N] positions in the schedule of the transitions that were trained, kl: [N] their KL; None of an
            algorithm that does not run the reference.
    """

    loss: Tensor
    reward: Tensor
    kl: Tensor | None
    index: Tensor


def decoded_reward(family: Family, reward: RewardFunction, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """The rewards [B] of the images that latents [B, ...] decode to, with their graph."""
    return reward(family.decode(latents.to(family.dtype)), prompts)


class Executor(ABC):
    """Adds the gradient of the SQDF loss to the policy's parameters.

    loss = 1/B sum_b [ -w_b r(x0_hat(x_{t-1}))_b + alpha KL_b ],  x_{t-1} from the current policy, w = gamma^k.

    What follows from values (which samples need a look-ahead) is decided on the CPU, so that the same code runs on fake
    tensors.

    Args:
        backbone: network and roles; schedule: coefficients of the sampler.
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B]; raises UserError when it misbehaves.
        objective: the loss's settings; guidance_scale: of policy and reference.
        execution: sizes of the chunks; the gradient does not depend on them beyond rounding.
        groups: modules that are checkpointed and offloaded as ``execution`` says; default: those of the backbone.
        impl: implementation of the kernels.

    Attributes:
        stage: the current or last stage; on_stage: called with its name as it begins.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: DenoisingSchedule,
        reward: RewardFunction,
        objective: Objective,
        *,
        guidance_scale: float,
        execution: Execution,
        groups: ModuleGroups | None = None,
        impl: str = "auto",
    ) -> None:
        self.backbone, self.schedule, self.reward, self.objective = backbone, schedule, reward, objective
        self.guidance_scale, self.execution, self.impl = guidance_scale, execution, impl
        self.groups = groups or ModuleGroups(backbone)
        self.groups.apply(execution)
        self.stage = ""
        self.on_stage: Callable[[str], None] = lambda name: None
        family = backbone.family
        self.precision = family.precision
        self.tables = schedule.to(family.device, self.precision)
        self.lookahead = self._lookahead_tables().to(family.device, self.precision)

    @abstractmethod
    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        """Gradients of the whole batch are added to what the parameters' ``grad`` holds.

        Args:
            batch: states drawn from the replay buffer; seeds: [B] int64, the noise of x_{t-1}.

        Raises:
            UserError: the reward returned something that is no reward; torch.OutOfMemoryError: whoever ran out of
                memory, libraries of the GPU included. Gradients are incomplete then: discard them.
        """

    def begin(self, stage: str, *needed: ModuleGroup) -> None:
        """Begin ``stage``: drop what it does not need, then upload what it needs, on its own account."""
        self.stage = stage
        self.groups.leave(*needed)
        self.on_stage(stage)
        self.groups.use(*needed)

    @property
    def lookahead_role(self) -> Role:
        """Whose estimate of x_0 the reward sees."""
        return "consistency" if self.objective.lookahead == "consistency" else "reference"

    @property
    def lookahead_scale(self) -> float:
        """Guidance scale of the look-ahead: a consistency model is distilled with its guidance."""
        return 1.0 if self.lookahead_role == "consistency" else self.guidance_scale

    def ahead(self, index: Tensor) -> list[int]:
        """Positions in the batch that have a look-ahead: x_prev of the last index is x_0 itself.

        ``index`` is the batch's own, on the CPU.
        """
        last = len(self.schedule) - 1
        return [number for number, i in enumerate(index.tolist()) if i < last]

    def _lookahead_tables(self) -> Lookahead:
        objective = self.objective
        if objective.lookahead == "consistency":
            return self.schedule.consistency(snap=objective.consistency_grid)
        if objective.lookahead == "deterministic":
            return self.schedule.deterministic(objective.lookahead_steps)
        return self.schedule.tweedie()
