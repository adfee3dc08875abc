"""Drawing trajectories x_T, ..., x_0 from a role of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.engine.compilation import Compilation, CompiledBlocks, compile_options, repeated_kinds
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.families import Conditioning
from sqdf_fast.kernels import posterior_mean
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.schedule import DenoisingSchedule

Keep = Literal["none", "trainable", "all"]
"""Which states of a trajectory to return: none, x_t at the K trainable indices, or all of x_T, ..., x_0."""


@dataclass(frozen=True)
class Trajectories:
    """Sampled trajectories.

    Attributes:
        x0: final latents [n, ...]; those at index ``stop`` where sampling stopped early.
        states: on the CPU, None if not kept. "trainable": [n, K, ...] in the network's dtype. "all":
            [n, T + 1, ...] in the family's precision, since a transition's probability is that of the very states.
    """

    x0: Tensor
    states: Tensor | None


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch.

    Attributes:
        i: position in the schedule; index: [B] int64 of it, on the device.
        x: x_t, [B, ...]; seeds: [B] int64.
        conditioning: of the B prompts; unconditional: one row, None without guidance.
    """

    i: int
    index: Tensor
    x: Tensor
    seeds: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None


class Sampler:
    """Guided ancestral sampling along a schedule; a step is x <- p x + q m + sigma z.

    Args:
        backbone: the network; schedule: its per-step coefficients.
        guidance_scale: 1 runs the conditional branch only.
        batch_size: samples denoised at once, both halves of the guidance in one network call; no effect on the noise.
        merge_lora: whether to sample with the role's LoRA merged into a copy of its layers' weights.
        channels_last: whether convolution weights are NHWC, in training too.
        compilation: compilation of the network's repeated blocks while it samples.
        impl: implementation of the kernels.

    Raises:
        UserError: this device or network does not support the compilation.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: DenoisingSchedule,
        *,
        guidance_scale: float,
        batch_size: int,
        merge_lora: bool = True,
        channels_last: bool = False,
        compilation: Compilation = "none",
        impl: str = "auto",
    ) -> None:
        self.backbone, self.schedule, self.impl = backbone, schedule, impl
        self.guidance_scale, self.batch_size = guidance_scale, batch_size
        self.merge_lora, self.compilation = merge_lora, compilation
        self._sigma: list[float] = schedule.transition[:, 2].tolist()
        self._trainable: list[bool] = schedule.trainable.tolist()
        family = backbone.family
        networks = {id(network): network for network in (backbone.network("policy"), backbone.network("reference"))}
        if channels_last:
            for parameter in (parameter for network in networks.values() for parameter in network.parameters()):
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._compiled: dict[int, CompiledBlocks] = {}
        if compilation != "none":
            options = compile_options(compilation, family.device)
            for key, network in networks.items():
                kinds = repeated_kinds(network, family.checkpointed_block_types["network"])
                self._compiled[key] = CompiledBlocks(network, kinds, **options)

    @normalize_oom_errors()
    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        *,
        role: Role = "policy",
        keep: Keep = "none",
        stop: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Trajectories:
        """Trajectories of a role for the prompts.

        Args:
            prompts: n prompts; seeds: [n] int64, one per sample.
            keep: states to return as well.
            stop: index of the state to stop at, 0 (the first noise) to T; None: T, the final latents.
            on_progress: called with (network calls done, network calls in all).
        """
        x0, states = [], []
        chunks = range(0, len(prompts), self.batch_size)
        steps = len(self.schedule) if stop is None else stop
        stored = self.backbone.family.precision if keep == "all" else self.backbone.family.dtype
        adapted = self.backbone.merged if self.merge_lora else self.backbone.role
        compiled = self._compiled.get(id(self.backbone.network(role)))
        with adapted(role), compiled.active() if compiled else nullcontext():
            for number, start in enumerate(chunks):
                part, kept = slice(start, start + self.batch_size), []
                for i, x in enumerate(self.walk(prompts[part], seeds[part], stop=steps)):
                    if keep == "all" or (keep == "trainable" and i < steps and self._trainable[i]):
                        kept.append(x.to("cpu", stored))
                    if on_progress and i:
                        on_progress(number * steps + i, len(chunks) * steps)
                x0.append(x)
                if kept:
                    states.append(torch.stack(kept, dim=1))
        return Trajectories(torch.cat(x0), torch.cat(states) if states else None)

    def walk(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        *,
        x: Tensor | None = None,
        first: int = 0,
        stop: int | None = None,
        transition: Callable[[Step], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The states x at index ``first``, ``first`` + 1, ..., ``stop`` of one batch of trajectories.

        The only denoising loop: other steps are a ``transition``, to stop early stop iterating. Steps run in the
        backbone's role, and with a graph where the caller has gradients enabled.

        Args:
            prompts: B prompts; seeds: [B] int64.
            x: state at ``first``, [B, ...]; None: the initial noise of the seeds.
            stop: index of the last state; None: T, the final latents.
            transition: from a step to the next state; default: :meth:`transition`.
        """
        family = self.backbone.family
        conditioning, unconditional = family.encode(prompts), family.unconditional(self.guidance_scale)
        x = self._noise(derive_seeds(Stream.INITIAL, ids=seeds), family.precision) if x is None else x
        yield x
        for i in range(first, len(self.schedule) if stop is None else stop):
            index = torch.full((len(x),), i, device=family.device)
            step = Step(i, index, x, seeds, conditioning, unconditional)
            x = self.transition(step) if transition is None else transition(step)
            yield x

    def transition(self, step: Step) -> Tensor:
        """x_{t-1} = p x + q m + sigma z."""
        if self.compilation == "cuda-graphs":
            # Outputs of the step before may be overwritten from here on; none is referenced.
            torch.compiler.cudagraph_mark_step_begin()
        m = self.backbone.predict(step.x, self.tables.timesteps[step.index], step.conditioning, step.unconditional)
        return self.add_noise(self.mean(step, m), step)

    def mean(self, step: Step, m: Tensor) -> Tensor:
        """The transition's mean p x + q m under guidance; m: the network's output, [B, ...] or [2B, ...]."""
        rows = self.tables.transition[:, :2]
        return posterior_mean(step.x, m, rows, step.index, guidance_scale=self.guidance_scale, impl=self.impl)

    def add_noise(self, mean: Tensor, step: Step) -> Tensor:
        """mean + sigma z."""
        sigma = self._sigma[step.i]
        if sigma == 0:
            return mean
        return mean + sigma * self._noise(derive_seeds(Stream.DENOISING, step.i, ids=step.seeds), mean.dtype)

    @property
    def tables(self) -> DenoisingSchedule:
        """The schedule's coefficients on the device, in the family's precision."""
        family = self.backbone.family
        return self.schedule.to(family.device, family.precision)

    def _noise(self, seeds: Tensor, dtype: torch.dtype) -> Tensor:
        family = self.backbone.family
        return philox_normal(seeds.to(family.device), family.latent_shape, dtype=dtype, device=family.device)
