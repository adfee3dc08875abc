"""Direct reward fine-tuning: the reward's gradient through the sampler's last steps (DRaFT-K), optionally with a KL.

DRaFT is Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv 2309.17400.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
from sqdf_fast.kernels import posterior_mean
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


class Pass(NamedTuple):
    """The result of one graph.

    Attributes:
        loss: [] with its graph, already divided by the whole batch; reward: [b].
        kl, positions: [N], of the transitions whose KL was measured.
    """

    loss: Tensor
    reward: Tensor
    kl: Tensor | None = None
    positions: Tensor | None = None


class DirectReward(Algorithm):
    """Follows the reward's own gradient back into the policy: one graph of network, decoder and reward.

    A step samples ``optimizer.batch_size`` trajectories of the current policy without a gradient, up to where the
    gradient begins, and backpropagates through the rest ``execution.micro_batch`` samples at a time.
    """

    _start: Start

    @abstractmethod
    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """The states from which the samples of optimizer step ``step`` carry a gradient."""

    @abstractmethod
    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """Losses of a micro-batch out of ``size`` samples, each backpropagated before the next one is computed.

        The first pass has the samples' own reward and KL; each begins with :meth:`forward`.
        """

    def collect(self, step: int) -> None:
        """Sample the step's trajectories up to where the gradient begins."""
        prompts, seeds = self.draw_prompts(step, self.config.optimizer.batch_size)
        self._start = self.start(prompts, seeds, step)

    def accumulate(self, step: int) -> StepResult:
        """The gradient of the mean loss of the collected samples."""
        del step
        start, size = self._start, self.runtime.execution.micro_batch
        losses, firsts = [], []
        for begin in range(0, len(start), size):
            part: list[Tensor] = []
            for loss, reward, kl, index in self.passes(start[begin : begin + size], len(start)):
                self.runtime.begin("backward", *ALL_GROUPS)
                loss.backward()
                if not part:
                    firsts.append((reward.detach(), kl, index))
                part.append(loss.detach())
            losses.append(torch.stack(part).sum())
        kls = [kl.detach() for _, kl, _ in firsts if kl is not None]
        indices = [index for *_, index in firsts if index is not None]
        return StepResult(
            torch.stack(losses).sum(),
            torch.cat([reward for reward, *_ in firsts]),
            torch.cat(kls) if kls else None,
            (torch.cat(indices) if indices else start.index).cpu(),
        )

    def forward(self) -> None:
        """Begin the forward stage of a pass."""
        self.runtime.begin("forward", *ALL_GROUPS)

    def walk(self, start: Start, first: int, *, with_kl: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The sampler's own steps from index ``first``, with their graph and their noise.

        Args:
            start: states at ``first``; with_kl: whether to measure the KL to the reference at trainable indices.

        Returns:
            x_0 [b, ...]; the measured KLs [N] and their indices [N], None without any.
        """
        sampler, trainable = self.runtime.sampler, self.schedule.trainable.tolist()
        kls, indices = [], []

        def transition(step: Step) -> Tensor:
            if not (with_kl and trainable[step.i]):
                m = self.runtime.output("policy", step.x, step.index, step.conditioning)
                return sampler.add_noise(sampler.mean(step, m), step)
            # No gradient through the reference, nor through its x: as in NVIDIA's DRaFT+.
            seed = derive_seeds(Stream.DENOISING, step.i, ids=step.seeds)
            x, kl = self.runtime.step(step.x, step.index, step.conditioning, seed=seed)
            kls.append(kl)
            indices.append(step.index)
            return x

        *_, x0 = sampler.walk(start.prompts, start.seeds, x=start.x, first=first, transition=transition)
        return x0, torch.cat(kls) if kls else None, torch.cat(indices) if indices else None

    def predicted(self, x: Tensor, index: Tensor, prompts: list[str]) -> Tensor:
        """x0_hat = a x + b m(x) of the policy, [B, ...] with its graph; x: [B, ...], index: [B] int64."""
        m = self.runtime.output("policy", x, index, self.family.encode(prompts))
        scale, impl = self.guidance_scale, self.config.impl
        return posterior_mean(x, m, self.tables.posterior, index, guidance_scale=scale, impl=impl)

    def sampled(self, prompts: list[str], seeds: Tensor, stop: int) -> Start:
        """The current policy's states at index ``stop``."""
        device = self.family.device
        x = self.runtime.sample(prompts, seeds, stop=stop).x0
        return Start(prompts, seeds.to(device), x, torch.full((len(prompts),), stop, device=device))


class Draft(DirectReward):
    """DRaFT-K: loss = mean -r(x_0), the gradient through the last K = ``draft.truncation`` steps; K = T is DRaFT."""

    with_kl: ClassVar[bool] = False

    def __init__(self, config: Config, runtime: Runtime, prompts: Sequence[str]) -> None:
        steps, truncation = len(runtime.sampler.schedule), config.own.truncation
        if truncation > steps:
            raise UserError(
                f"{section_of(config.algorithm)}.truncation = {truncation} exceeds the {steps} denoising steps; "
                f"allowed: 1 to {steps} (sampling.num_inference_steps)"
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
        x0, kl, index = self.walk(start, self.first, with_kl=self.with_kl)
        reward = self.runtime.score_latents(x0, start.prompts)
        loss = -reward.sum() / size
        if kl is not None:
            loss = loss + self.config.objective.alpha * kl.sum() / size
        yield Pass(loss, reward, kl, index)


class DraftKl(Draft):
    """DRaFT-K with a KL: loss = mean [-r(x_0) + alpha sum KL] over the trainable ones of the last K transitions.

    Raises:
        UserError: none of the last K indices is trainable.
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
