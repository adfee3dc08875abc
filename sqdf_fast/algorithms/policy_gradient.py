"""What the gradient-free algorithms share: collections, advantages, importance ratios.

A collection of ``replay.refill`` samples and their rewards serves ``replay.steps_per_refill`` optimizer steps. A step
takes ``optimizer.batch_size`` trajectories in shuffled order, reshuffled once all were taken, and ``timesteps`` indices
of each. The choice depends on the seed and the number of the collection alone.

The ratio pi_theta / pi_old is 1 at a collection's first step: the old value is the new one, detached. For the later
steps, the old values are computed before that first step changes the policy, by the network as it trains: sampling
used a merged copy of it, rounded in half precision.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sqdf_fast.algorithms.advantages import advantages
from sqdf_fast.algorithms.base import Algorithm
from sqdf_fast.config import Config, section_of
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.module_groups import ModuleGroup
from sqdf_fast.engine.noise import Stream, generator
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.engine.sampler import Keep
from sqdf_fast.errors import UserError
from sqdf_fast.kernels import posterior_mean


@dataclass(frozen=True)
class Pairs:
    """Samples of a collection at indices of the schedule, [N] int64 each, on the CPU.

    Attributes:
        trajectory: position in the collection; index: in the schedule.
        number: running number of the pair among those of the collection's steps.
    """

    trajectory: Tensor
    index: Tensor
    number: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> Pairs:
        return Pairs(self.trajectory[rows], self.index[rows], self.number[rows])


class Collection(NamedTuple):
    """Samples and their rewards.

    Attributes:
        number: running number in the run; prompts: n.
        stored: states [n, T + 1, ...] or x_0 [n, ...], on the CPU.
        rewards: [n] float64 on the CPU.
    """

    number: int
    prompts: list[str]
    stored: Tensor
    rewards: Tensor


class PolicyGradient(Algorithm):
    """loss = 1/N sum [surrogate(ratio, advantage) + alpha penalty] over the N pairs of a step.

    Class attributes:
        keep: states of a trajectory that are stored; "none": x_0 alone.
        regularized: whether the reference is run, where ``objective.alpha`` is not 0.
        epsilon, pooled: of :func:`advantages`.

    Raises:
        UserError: a collection that cannot be compared or divided, or more timesteps than can be trained.
    """

    needs_gradient: ClassVar[bool] = False
    keep: ClassVar[Keep] = "none"
    regularized: ClassVar[bool] = False
    epsilon: ClassVar[float] = 1e-8
    pooled: ClassVar[bool] = False

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        super().__init__(config, runtime, prompts)
        self.indices = torch.nonzero(self.schedule.trainable.cpu(), as_tuple=True)[0]
        self.timesteps = self._timesteps()
        self.clip_range = config.own.clip_range
        self.regularize = self.regularized and config.objective.alpha > 0
        self.collection: Collection | None = None
        self._old: Tensor | None = None

    def collect(self, step: int) -> None:
        """A new collection every ``replay.steps_per_refill`` steps."""
        number = step // self.config.replay.steps_per_refill
        if self.collection is not None and self.collection.number == number:
            return
        runtime = self.runtime
        prompts, seeds = self.draw_prompts(number, self.config.replay.refill, each=self.config.own.group)
        sampled = runtime.sample(prompts, seeds, keep=self.keep)
        rewards = runtime.rewards(sampled.x0, prompts)
        stored = sampled.x0.cpu() if sampled.states is None else sampled.states
        self.collection = Collection(number, prompts, stored, rewards.detach().double().cpu())
        self._old = None

    def accumulate(self, step: int) -> StepResult:
        """The gradient of the surrogate on this step's pairs of the collection."""
        collection = self._collected
        first = collection.number * self.config.replay.steps_per_refill
        pairs = self._pairs(step - first, step - first + 1)
        steps = min(self.config.replay.steps_per_refill, self.config.steps - first)
        if self._old is None and steps > 1:
            self._old = self._log_probs(self._pairs(1, steps))
        own = self.config.own
        gain = advantages(
            collection.rewards, own.group, clip=own.clip_advantage, epsilon=self.epsilon, pooled=self.pooled
        )
        losses, kls = [], []
        for part in self._parts(pairs):
            old = None if step == first or self._old is None else self._old[part.number]
            loss, kl = self._loss(part, gain[part.trajectory], old, len(pairs))
            self.runtime.begin("backward", *self._needed)
            loss.backward()
            losses.append(loss.detach())
            kls.append(kl)
        rewards = collection.rewards[pairs.trajectory[:: self.timesteps]]
        known = [kl for kl in kls if kl is not None]
        return StepResult(torch.stack(losses).sum(), rewards, torch.cat(known) if known else None, pairs.index)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The collection, and the old log-probabilities once they are known."""
        if self.collection is None:
            return {}, {"number": None, "prompts": []}
        tensors = {"stored": self.collection.stored, "rewards": self.collection.rewards}
        if self._old is not None:
            tensors["old"] = self._old
        return tensors, {"number": self.collection.number, "prompts": self.collection.prompts}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The collection as it was. Raises ValueError when it is of another size."""
        if values["number"] is None:
            return
        stored, rewards, refill = tensors["stored"], tensors["rewards"], self.config.replay.refill
        if not len(stored) == len(rewards) == len(values["prompts"]) == refill:
            raise ValueError(f"a collection of {len(stored)} samples where replay.refill = {refill}")
        self.collection = Collection(values["number"], list(values["prompts"]), stored, rewards)
        self._old = tensors.get("old")

    @property
    def _collected(self) -> Collection:
        assert self.collection is not None, "collect comes before accumulate"
        return self.collection

    @property
    def _needed(self) -> tuple[ModuleGroup, ...]:
        return ("network",) if self.regularize else self.runtime.groups.of_role("policy")

    @abstractmethod
    def _likelihood(self, pairs: Pairs, regularize: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The policy's log-probability of these pairs, mean over the elements of a sample, [N] with its graph.

        Returns:
            it, what ``objective.alpha`` multiplies, and the KL of the transition; None without ``regularize``.
        """

    def _guided(
        self, pairs: Pairs, x: Tensor, rows: Tensor, kl_scale: float, regularize: bool
    ) -> tuple[Tensor, Tensor | None]:
        """p x + q m of the policy's guided output m, and with ``regularize`` its KL to the reference's.

        Args:
            x: [N, ...]; rows: [T, 3], p, q and sigma at each index.
        """
        index = pairs.index.to(x.device)
        conditioning = self.family.encode([self._collected.prompts[i] for i in pairs.trajectory.tolist()])
        if regularize:
            # Without noise the step is its mean.
            zero = torch.zeros_like(x)
            return self.runtime.step(x, index, conditioning, noise=zero, table=rows, kl_scale=kl_scale)
        policy, scale = self.runtime.output("policy", x, index, conditioning), self.guidance_scale
        return posterior_mean(x, policy, rows[:, :2], index, guidance_scale=scale, impl=self.config.impl), None

    def _key(self, pairs: Pairs) -> Tensor:
        """[N] int64: pairs of the same key have the same likelihood."""
        return pairs.trajectory * len(self.schedule) + pairs.index

    def _surrogate(self, ratio: Tensor, gain: Tensor) -> Tensor:
        """PPO's, arXiv 1707.06347, eq. 7: the larger of the two losses, [N]."""
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-gain * ratio, -gain * clipped)

    def _columns(self, rows: int, source: torch.Generator) -> Tensor:
        """Which of the trainable indices are trained, [rows, timesteps]: a random subset for each trajectory."""
        return torch.rand(rows, len(self.indices), generator=source).argsort(dim=1)[:, : self.timesteps]

    def _loss(self, pairs: Pairs, gain: Tensor, old: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
        self.runtime.begin("forward", *self._needed)
        log_prob, penalty, kl = self._likelihood(pairs, self.regularize)
        ratio = (log_prob - (log_prob.detach() if old is None else old.to(log_prob))).exp()
        loss = self._surrogate(ratio, gain.to(log_prob))
        if penalty is not None:
            loss = loss + self.config.objective.alpha * penalty
        return loss.sum() / total, None if kl is None else kl.detach().cpu()

    def _pairs(self, begin: int, end: int) -> Pairs:
        """Those of the collection's steps begin, ..., end - 1, counted from its first."""
        steps, size = self.config.replay.steps_per_refill, self.config.optimizer.batch_size
        refill, source = self.config.replay.refill, generator(self.config.seed, Stream.REPLAY, self._collected.number)
        rows = steps * size
        order = torch.cat([torch.randperm(refill, generator=source) for _ in range(-(-rows // refill))])[:rows]
        index = self.indices[self._columns(rows, source)]
        pairs = Pairs(order.repeat_interleave(self.timesteps), index.flatten(), torch.arange(rows * self.timesteps))
        each = size * self.timesteps
        return pairs[begin * each : end * each]

    def _parts(self, pairs: Pairs) -> Iterator[Pairs]:
        size = self.runtime.execution.micro_batch
        for start in range(0, len(pairs), size):
            yield pairs[start : start + size]

    @torch.no_grad()
    def _log_probs(self, pairs: Pairs) -> Tensor:
        """Of the policy before the collection's first update, by the numbers of the pairs; each distinct pair once."""
        distinct, inverse = torch.unique(self._key(pairs), return_inverse=True)
        first = torch.full_like(distinct, len(pairs)).scatter_reduce(0, inverse, torch.arange(len(pairs)), "amin")
        self.runtime.begin("forward", *self._needed)
        log_probs = torch.cat([self._likelihood(part, False)[0].cpu() for part in self._parts(pairs[first])])
        old = torch.zeros(int(pairs.number.max()) + 1, dtype=log_probs.dtype)
        old[pairs.number] = log_probs[inverse]
        return old

    def _timesteps(self) -> int:
        """Indices of each trajectory in an update. Raises UserError as the class."""
        config, trainable = self.config, len(self.indices)
        refill, group, asked = config.replay.refill, config.own.group, config.own.timesteps
        section = section_of(config.algorithm)
        if refill % group or refill == 1:
            raise UserError(
                f"replay.refill = {refill} with {section}.group = {group}: {config.algorithm} compares the samples of "
                "a group; give at least 2 and a multiple of the group"
            )
        if asked is not None and asked > trainable:
            raise UserError(
                f"{section}.timesteps = {asked} and this schedule has {trainable} trainable steps; give at most "
                f"{trainable}, or leave it out to take them all"
            )
        return trainable if asked is None else asked
