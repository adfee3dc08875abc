"""Drawing trajectories x_T, ..., x_0 from a role of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.engine.compilation import Compilation, CompiledBlocks, compile_options, repeated_kinds
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
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
        states: on the CPU, None unless asked for. "trainable": [n, K, ...] in the network's dtype. "all":
            [n, T + 1, ...] in the family's precision, since a transition's probability is that of the very states.
    """

    x0: Tensor
    states: Tensor | None


class Sampler:
    """Guided ancestral sampling along a schedule; a step is x <- p x + q m + sigma z.

    Args:
        backbone: the network; schedule: its per-step coefficients.
        guidance_scale: 1 runs the conditional branch only.
        batch_size: samples denoised at once, both halves of the guidance in one network call. A sample's noise does
            not depend on it.
        merge_lora: sample with the role's LoRA merged into a copy of its layers' weights; the same up to rounding.
        channels_last: lay the network's convolution weights out as NHWC, for good: training runs on them too.
        compilation: of the network's repeated blocks while it samples.
        impl: implementation of the kernels.

    Raises:
        UserError: a compilation that this device or network does not have.
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
            for network in networks.values():
                _lay_out_channels_last(network)
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
        """Trajectories for the prompts.

        Args:
            prompts: n prompts; seeds: [n] int64, one a sample.
            role: whose trajectories.
            keep: states to return as well.
            stop: index of the state to stop at, 0 (the first noise) to T; None: T, the final latents.
            on_progress: called with (network calls done, network calls in all).
        """
        x0, states = [], []
        chunks = range(0, len(prompts), self.batch_size)
        steps = len(self.schedule) if stop is None else stop
        with self._ready(role):
            for number, start in enumerate(chunks):
                part = slice(start, start + self.batch_size)

                def report(step: int, done: int = number * steps) -> None:
                    if on_progress:
                        on_progress(done + step, len(chunks) * steps)

                latents, kept = self._denoise(prompts[part], seeds[part], keep, steps, report)
                x0.append(latents)
                states += kept
        return Trajectories(torch.cat(x0), torch.cat(states) if states else None)

    @contextmanager
    def _ready(self, role: Role) -> Iterator[None]:
        adapted = self.backbone.merged if self.merge_lora else self.backbone.role
        compiled = self._compiled.get(id(self.backbone.network(role)))
        with adapted(role), compiled.active() if compiled else nullcontext():
            yield

    def _denoise(
        self, prompts: Sequence[str], seeds: Tensor, keep: Keep, steps: int, report: Callable[[int], None]
    ) -> tuple[Tensor, list[Tensor]]:
        family = self.backbone.family
        device = family.device
        tables = self.schedule.to(device, family.precision)
        conditioning = family.encode(prompts)
        unconditional = family.encode([""]) if self.guidance_scale != 1 else None
        x = self._noise(derive_seeds(Stream.INITIAL, ids=seeds), tables.transition.dtype)
        states, stored = [], family.precision if keep == "all" else family.dtype
        for i in range(steps):
            if keep == "all" or (keep == "trainable" and self._trainable[i]):
                states.append(x.to("cpu", stored))
            index = torch.full((len(x),), i, device=device)
            if self.compilation == "cuda-graphs":
                # Outputs of the step before may be overwritten from here on: none is held.
                torch.compiler.cudagraph_mark_step_begin()
            m = self.backbone.predict(x, tables.timesteps[index], conditioning, unconditional)
            mean = posterior_mean(
                x,
                m,
                tables.transition[:, :2],
                index,
                guidance_scale=self.guidance_scale,
                impl=self.impl,
            )
            sigma = self._sigma[i]
            # The noise of a step that adds none is not drawn.
            x = (
                mean
                if sigma == 0
                else mean + sigma * self._noise(derive_seeds(Stream.DENOISING, i, ids=seeds), x.dtype)
            )
            report(i + 1)
        if keep == "all":
            states.append(x.to("cpu", stored))
        return x, [torch.stack(states, dim=1)] if states else []

    def _noise(self, seeds: Tensor, dtype: torch.dtype) -> Tensor:
        family = self.backbone.family
        return philox_normal(seeds.to(family.device), family.latent_shape, dtype=dtype, device=family.device)


def _lay_out_channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
