"""How a step is executed: executors, the sampler, optimizers, and where weights live."""

from __future__ import annotations

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.executor import Executor, RewardFunction, StepResult
from sqdf_fast.engine.joint import JointExecutor
from sqdf_fast.engine.module_groups import ModuleGroups
from sqdf_fast.engine.staged import StagedExecutor
from sqdf_fast.schedule import DenoisingSchedule

__all__ = [
    "Executor",
    "JointExecutor",
    "ModuleGroups",
    "RewardFunction",
    "StagedExecutor",
    "StepResult",
    "make_executor",
]

_EXECUTORS: dict[str, type[Executor]] = {"joint": JointExecutor, "staged": StagedExecutor}


def make_executor(
    backbone: Backbone,
    schedule: DenoisingSchedule,
    reward: RewardFunction,
    objective: Objective,
    *,
    guidance_scale: float,
    execution: Execution,
    groups: ModuleGroups | None = None,
    impl: str = "auto",
) -> Executor:
    """The executor that ``execution`` names; arguments as of :class:`Executor`."""
    return _EXECUTORS[execution.executor](
        backbone,
        schedule,
        reward,
        objective,
        guidance_scale=guidance_scale,
        execution=execution,
        groups=groups,
        impl=impl,
    )
