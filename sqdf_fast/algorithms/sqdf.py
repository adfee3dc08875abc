"""SQDF: the reparameterised gradient of the soft Q-function, on states of a replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sqdf_fast.algorithms.base import Algorithm
from sqdf_fast.config import Config
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.noise import Stream, generator, sample_seeds
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.replay import ReplayBuffer


class Sqdf(Algorithm):
    """Kang et al., arXiv 2512.04559: off-policy states, transitions of the current policy, one look-ahead."""

    can_fall_back_to_staged: ClassVar[bool] = True

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        super().__init__(config, runtime, prompts)
        self.replay = ReplayBuffer(
            config.replay.capacity,
            self.schedule.trainable,
            config.replay.mode,
            gamma=config.objective.gamma,
            store=config.replay.store,
            levels=self.schedule.levels,
        )
        self.refills = 0

    def collect(self, step: int) -> None:
        """Refill the buffer once every ``replay.steps_per_refill`` steps."""
        settings, runtime = self.config.replay, self.runtime
        if self.refills * settings.steps_per_refill > step:
            return
        prompts, seeds = self.draw_prompts(self.refills, settings.refill)
        sampled = runtime.sample(prompts, seeds, keep="trainable" if settings.store == "states" else "none")
        rewards = runtime.rewards(sampled.x0, prompts) if settings.mode == "prioritised" else None
        # The buffer's x_0 have the network's precision, as its states do.
        stored = sampled.x0.to(self.family.dtype) if sampled.states is None else sampled.states
        self.replay.add(stored, prompts, rewards)
        self.refills += 1

    def accumulate(self, step: int) -> StepResult:
        """The gradient of the loss on states drawn from the buffer."""
        seed, size = self.config.seed, self.config.optimizer.batch_size
        batch = self.replay.draw(size, generator(seed, Stream.REPLAY, step))
        result = self.runtime.gradient(batch, sample_seeds(seed, Stream.TRANSITION, step, size))
        if step == 0 and self.config.objective.mask_nonpositive and torch.all(result.reward <= 0):
            raise UserError(
                "every reward of the first batch is <= 0 and objective.mask_nonpositive drops such samples: nothing "
                "would be learnt; set objective.mask_nonpositive=false, or shift the reward"
            )
        return result

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The buffer and the number of its refills."""
        replay = self.replay.state_dict()
        tensors = replay.pop("tensors")
        return tensors, {"refills": self.refills, "replay": replay}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Buffer and refills as they were."""
        self.replay.load_state_dict({**values["replay"], "tensors": tensors})
        self.refills = values["refills"]
