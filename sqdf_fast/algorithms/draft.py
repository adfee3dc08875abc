"""Direct reward fine-tuning: the reward's gradient through the last steps of the sampler (DRaFT-K), with a KL if asked.

DRaFT is Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv 2309.17400.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sqdf_fast.algorithms.base import Algorithm
from sqdf_fast.config import Config, section_of
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.engine.sampler import Step
from sqdf_fast.errors import UserError
from sqdf_fast.kernels import denoise_step
from sqdf_fast.kernels.philox import derive_seeds


@dataclass(frozen=True)
class Start:
    """States x_t that the current policy sampled without a gradient, on the device.

    Attributes:
        prompts, seeds: of the B samples, seeds [B] int64; x: [B, ...] in the family's precision.
        index: [B] int64, each state's position in the schedule.
    """

    prompts: list[str]
    seeds: Tensor
    x: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> Start:
        return Start(self.prompts[part], self.seeds[part], self.x[part], self.index[part])


@dataclass(frozen=True)
class Pass:
    """What one graph gave.

    Attributes:
        loss: [] with its graph, already divided by the whole batch; reward: [b].
        kl, index: [N], of the transitions whose KL was measured.
    """

    loss: Tensor
    reward: Tensor
    kl: Tensor | None = None
    index: Tensor | None = None


class DirectReward(Algorithm):
    """What follows the reward's own gradient back into the policy: one graph of network, decoder and reward.

    A step samples ``optimizer.batch_size`` trajectories of the current policy without a gradient, up to where the
    gradient begins, and pulls the rest back ``execution.micro_batch`` samples at a time.
    """

    _start: Start

    @abstractmethod
    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """The states from which the samples of optimizer step ``step`` carry a gradient."""

    @abstractmethod
    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """Losses of a micro-batch out of ``size`` samples; each is pulled back before the next one is computed."""

    def collect(self, step: int) -> None:
        """Sample the step's trajectories up to where the gradient begins."""
        prompts, seeds = self.draw_prompts(step, self.config.optimizer.batch_size)
        self._start = self.start(prompts, seeds, step)

    def accumulate(self, step: int) -> StepResult:
        """The gradient of the mean loss of the collected samples."""
        del step
        start, size = self._start, self.runtime.execution.micro_batch
        found = [self._pull_back(start[first : first + size], len(start)) for first in range(0, len(start), size)]
        kls = [one.kl for one in found if one.kl is not None]
        indices = [one.index for one in found if one.index is not None]
        return StepResult(
            torch.stack([one.loss for one in found]).sum(),
            torch.cat([one.reward for one in found]),
            torch.cat(kls) if kls else None,
            torch.cat(indices).cpu() if indices else start.index.cpu(),
        )

    def forward(self) -> None:
        """A pass begins now; to be said before each."""
        self.runtime.begin("forward", *ALL_GROUPS)

    def walk(self, start: Start, first: int, *, with_kl: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The sampler's own steps from index ``first`` on, with their graph and their noise.

        Args:
            start: states at ``first``.
            with_kl: measure the KL to the reference wherever the schedule has one, at its trainable indices.

        Returns:
            x_0 [b, ...]; the measured KLs, [b] each, and their indices, [b] each.
        """
        sampler, trainable = self.runtime.sampler, self.schedule.trainable.tolist()
        kls, indices = [], []

        def transition(step: Step) -> Tensor:
            m = self.output("policy", step.x, step.index, step.conditioning)
            if not (with_kl and trainable[step.i]):
                return sampler.add_noise(sampler.mean(step, m), step)
            # The reference has no gradient, not by way of x either: as in NVIDIA's DRaFT+.
            with torch.no_grad():
                reference = self.output("reference", step.x, step.index, step.conditioning)
            x, kl = denoise_step(
                step.x,
                m,
                reference,
                self.tables.transition,
                step.index,
                guidance_scale=self.guidance_scale,
                seed=derive_seeds(Stream.DENOISING, step.i, ids=step.seeds),
                kl_scale=self.config.objective.kl_scale,
                impl=self.config.impl,
            )
            kls.append(kl)
            indices.append(step.index)
            return x

        *_, x0 = sampler.walk(start.prompts, start.seeds, x=start.x, first=first, transition=transition)
        return x0, kls, indices

    def sampled(self, prompts: list[str], seeds: Tensor, stop: int) -> Start:
        """The current policy's states at index ``stop``."""
        device = self.family.device
        x = self.runtime.sample(prompts, seeds, stop=stop).x0
        return Start(prompts, seeds.to(device), x, torch.full((len(prompts),), stop, device=device))

    def _pull_back(self, start: Start, size: int) -> Pass:
        """The passes of a micro-batch, pulled back and added up; reward and KL are those of the first."""
        found = []
        for one in self.passes(start, size):
            self.runtime.begin("backward", *ALL_GROUPS)
            one.loss.backward()
            kl = None if one.kl is None else one.kl.detach()
            found.append(Pass(one.loss.detach(), one.reward.detach(), kl, one.index))
        return replace(found[0], loss=torch.stack([one.loss for one in found]).sum())


class Draft(DirectReward):
    """DRaFT-K: loss = mean -r(x_0), the gradient through the last K = ``draft.truncation`` steps; K = T is DRaFT."""

    with_kl: ClassVar[bool] = False

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        steps, truncation = len(runtime.sampler.schedule), config.own.truncation
        if truncation > steps:
            raise UserError(
                f"{section_of(config.algorithm)}.truncation = {truncation} is more than the {steps} denoising steps "
                f"there are; allowed: 1 to {steps} (sampling.num_inference_steps)"
            )
        super().__init__(config, runtime, prompts)
        self.first = steps - truncation

    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """States at index T - K."""
        del step
        return self.sampled(prompts, seeds, self.first)

    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """One: the last K steps, decode, reward."""
        self.forward()
        x0, kls, indices = self.walk(start, self.first, with_kl=self.with_kl)
        reward = self.runtime.score_latents(x0, start.prompts)
        loss = -reward.sum() / size
        if not kls:
            yield Pass(loss, reward)
            return
        kl = torch.cat(kls)
        yield Pass(loss + self.config.objective.alpha * kl.sum() / size, reward, kl, torch.cat(indices))


class DraftKl(Draft):
    """DRaFT-K with a KL: loss = mean [-r(x_0) + alpha sum KL] over those of the last K transitions that have one.

    Raises:
        UserError: none of the last K indices is trainable, so that there would be no KL at all.
    """

    with_kl: ClassVar[bool] = True

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        super().__init__(config, runtime, prompts)
        trainable = self.schedule.trainable
        if not trainable[self.first :].any():
            needed = len(trainable) - int(trainable.nonzero().max())
            raise UserError(
                f"draft-kl with draft_kl.truncation = {config.draft_kl.truncation} has no KL: the last steps of this "
                f"schedule add (next to) no noise; set draft_kl.truncation={needed} or more"
            )
