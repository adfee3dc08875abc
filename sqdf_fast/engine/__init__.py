"""How a step is executed: executors, the sampler, optimizers, and where weights are."""

from __future__ import annotations

from typing import Any

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.executor import Executor, RewardFunction, StepResult
from sqdf_fast.engine.joint import JointExecutor
from sqdf_fast.engine.module_groups import ModuleGroups
from sqdf_fast.engine.staged import StagedExecutor
from sqdf_fast.schedule import DenoisingSchedule

__all__ = ["Executor", "ModuleGroups", "RewardFunction", "StepResult", "make_executor"]


def make_executor(
    backbone: Backbone,
    schedule: DenoisingSchedule,
    reward: RewardFunction,
    objective: Objective,
    *,
    execution: Execution,
    **options: Any,
) -> Executor:
    """The executor that ``execution`` names; arguments as of :class:`Executor`."""
    kind = JointExecutor if execution.executor == "joint" else StagedExecutor
    return kind(backbone, schedule, reward, objective, execution=execution, **options)
