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
from sqdf_fast.schedule import DenoisingSchedule

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, per sample and detached.

    Attributes:
        loss: [] of the whole batch; reward: [B].
        kl: [N], one for each trained transition; None of an algorithm that does not run the reference.
        index: [N] positions of these transitions in the schedule.
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

    Args:
        backbone: network and roles; schedule: coefficients of the sampler.
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B]; raises UserError for invalid rewards.
        objective: the loss's settings; guidance_scale: of policy and reference.
        execution: chunk sizes; they change the gradient by rounding only.
        groups: modules that are checkpointed and offloaded as ``execution`` says; default: those of the backbone.
        impl: implementation of the kernels.

    Attributes:
        stage: the current or last stage; on_stage: called with its name as it begins.
        lookahead_role: the network behind x0_hat; lookahead_scale: its guidance scale.
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
        self.lookahead_role: Role = "reference"
        self.lookahead_scale = guidance_scale
        if objective.lookahead == "consistency":
            # A consistency model is distilled with its guidance.
            self.lookahead_role, self.lookahead_scale = "consistency", 1.0
            lookahead = schedule.consistency(snap=objective.consistency_grid)
        elif objective.lookahead == "deterministic":
            lookahead = schedule.deterministic(objective.lookahead_steps)
        else:
            lookahead = schedule.tweedie()
        self.lookahead = lookahead.to(family.device, self.precision)

    @abstractmethod
    def accumulate(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        """Add the gradients of the whole batch to the parameters' ``grad``.

        Args:
            batch: states drawn from the replay buffer; seeds: [B] int64, the noise of x_{t-1}.

        Raises:
            UserError: invalid rewards; torch.OutOfMemoryError: PyTorch or a library of the GPU ran out of memory.
                Gradients are incomplete then: discard them.
        """

    def begin(self, stage: str, *needed: ModuleGroup) -> None:
        """Begin ``stage``: drop the offloaded weights that it does not need, then upload those that it needs."""
        self.stage = stage
        self.groups.leave(*needed)
        self.on_stage(stage)
        self.groups.use(*needed)

    def ahead(self, index: Tensor) -> list[int]:
        """Positions in the batch that need a look-ahead: at the last index x_prev is x_0 itself.

        ``index`` is the batch's own, on the CPU: decided there, the same code runs on fake tensors.
        """
        last = len(self.schedule) - 1
        return [number for number, i in enumerate(index.tolist()) if i < last]
