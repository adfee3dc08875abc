"""What an algorithm learns from: trajectories, pictures and scores of the model as it is now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Config, Execution
from sqdf_fast.engine.executor import RewardFunction
from sqdf_fast.engine.module_groups import Part, Parts
from sqdf_fast.engine.noise import Stream, generator, sample_seeds
from sqdf_fast.engine.oom_fallback import next_fallback, normalize_oom_errors
from sqdf_fast.engine.sampler import Sampler, Trajectories
from sqdf_fast.errors import UserError
from sqdf_fast.families import Family
from sqdf_fast.kernels import denoise_step

Progress = Callable[[str], Callable[[int, int], None]]


@torch.no_grad()
def decode_images(family: Family, latents: Tensor, batch_size: int) -> Tensor:
    """Images [n, 3, H, W] float32 in [0, 1] on the CPU, decoded ``batch_size`` at a time."""
    parts = [family.decode(part.to(family.dtype)).float().cpu() for part in latents.split(batch_size)]
    return torch.cat(parts)


class Rollouts:
    """Sampling, decoding and scoring, a few at a time, and fewer when memory runs out.

    Args:
        config: of the run; prompts: those it trains on.
        backbone: network and roles; sampler: of its trajectories.
        score: images [B, 3, H, W] in [0, 1] and B prompts to [B]; raises UserError when the reward misbehaves.
        parts: modules that recompute and move.
        on_stage: told the name of a stage as it begins.
        on_progress: given a phase's name, returns what is told (done, total) of it; may raise to stop the run.
        on_smaller: told what was given up when memory ran out.

    Attributes:
        execution: how a step is computed; gets smaller when memory runs out.
        stage: the stage that runs or ran last.
        reward_evaluations: pictures scored so far.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[str],
        backbone: Backbone,
        sampler: Sampler,
        score: RewardFunction,
        parts: Parts,
        *,
        on_stage: Callable[[str], None] = lambda name: None,
        on_progress: Progress = lambda phase: lambda done, total: None,
        on_smaller: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.config, self.prompts = config, list(prompts)
        self.backbone, self.sampler, self.parts = backbone, sampler, parts
        self._on_stage, self._on_progress, self._on_smaller = on_stage, on_progress, on_smaller
        self._score = score
        self.reward_evaluations = 0
        self.execution: Execution = config.execution
        self.stage = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The reward of each picture, [B], with its graph."""
        self.reward_evaluations += len(prompts)
        return self._score(images, prompts)

    def enter(self, stage: str) -> None:
        """``stage`` begins now."""
        self.stage = stage
        self._on_stage(stage)

    def begin(self, stage: str, *needed: Part) -> None:
        """``stage`` begins now and needs these parts' weights on the device."""
        self.parts.leave(*needed)
        self.enter(stage)
        self.parts.use(*needed)

    def fresh(self, number: int, count: int, *, each: int = 1) -> tuple[list[str], Tensor]:
        """The prompts and seeds of the run's collection ``number``: the same whenever they are asked for.

        Args:
            count: samples; each: consecutive samples that share a prompt, for advantages within a group.

        Returns:
            ``count`` prompts, drawn with replacement, and seeds [count] int64.
        """
        groups = -(-count // each)
        choice = torch.randint(
            len(self.prompts), (groups,), generator=generator(self.config.seed, Stream.PROMPTS, number)
        )
        prompts = [self.prompts[i] for i in choice.tolist() for _ in range(each)][:count]
        return prompts, sample_seeds(self.config.seed, Stream.REFILL, number, count)

    def sample(self, prompts: Sequence[str], seeds: Tensor, phase: str = "sampling", **options: Any) -> Trajectories:
        """Trajectories of a role (default: the policy), see :meth:`Sampler.sample`.

        Raises:
            UserError: not even one picture fits the memory.
        """
        while True:
            self.enter("sampling")
            try:
                with normalize_oom_errors():
                    self.parts.use(*self.parts.of_role(options.get("role", "policy")))
                    return self.sampler.sample(prompts, seeds, on_progress=self._on_progress(phase), **options)
            except torch.OutOfMemoryError:
                # Tried again outside the handler: until then the failed call's tensors are alive.
                pass
            size = self.sampler.batch_size
            if size == 1:
                raise UserError("out of GPU memory while sampling one picture; a smaller model or --vram would help")
            self.sampler.batch_size = size // 2
            self._on_smaller(f"out of memory while {phase}: sampling.batch_size {size} -> {size // 2}")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, ...] to images [n, 3, H, W] float32 on the CPU."""
        family = self.backbone.family
        return self._in_groups(lambda size: decode_images(family, latents, size))

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rewards of the pictures that latents [n, ...] decode to: [n], no gradient."""
        return self._in_groups(lambda size: self._scores(latents, prompts, size))

    @torch.no_grad()
    def divergence(self, states: Tensor, prompts: Sequence[str]) -> Tensor:
        """KL of one step between policy and reference, at one state of each trajectory: [n] float32 on the CPU.

        The states take turns along the schedule, so that the mean over many trajectories is that over its trainable
        steps. Mean over the elements of a sample, without the factor 1/2, times ``objective.kl_scale``.

        Args:
            states: x_t at the schedule's K trainable indices, [n, K, ...]; prompts: n.
        """
        family, schedule = self.backbone.family, self.sampler.schedule
        turn = torch.arange(len(states)) % states.shape[1]
        x = states[torch.arange(len(states)), turn]
        index = torch.nonzero(schedule.trainable.cpu(), as_tuple=True)[0][turn]
        while True:
            self.enter("divergence")
            size = self.sampler.batch_size
            try:
                with normalize_oom_errors():
                    self.parts.use("network")
                    parts = [slice(start, start + size) for start in range(0, len(x), size)]
                    return torch.cat([self._divergence(x[part], index[part], prompts[part]) for part in parts])
            except torch.OutOfMemoryError:
                pass
            if size == 1:
                raise UserError(f"out of memory for one network call of {family.name}; a smaller model would help")
            self.sampler.batch_size = size // 2
            self._on_smaller(f"out of memory while evaluating: sampling.batch_size {size} -> {size // 2}")

    def _divergence(self, x: Tensor, index: Tensor, prompts: Sequence[str]) -> Tensor:
        family, scale = self.backbone.family, self.sampler.guidance_scale
        tables = self.sampler.schedule.to(family.device, family.precision)
        x, index = x.to(family.device, family.precision), index.to(family.device)
        unconditional = None if scale == 1 else family.encode([""])
        outputs: dict[Role, Tensor] = {}
        roles: tuple[Role, ...] = ("policy", "reference")
        conditioning = family.encode(prompts)
        for role in roles:
            with self.backbone.role(role):
                outputs[role] = self.backbone.predict(x, tables.timesteps[index], conditioning, unconditional)
        _, kl = denoise_step(
            x,
            outputs["policy"],
            outputs["reference"],
            tables.transition,
            index,
            guidance_scale=scale,
            noise=torch.zeros_like(x),
            kl_scale=self.config.objective.kl_scale,
            impl=self.config.impl,
        )
        return kl.float().cpu()

    def smaller(self, stage: str, step: int, *, staged: bool) -> None:
        """A smaller execution from now on, for a stage that ran out of memory.

        Args:
            staged: whether the joint graph may be taken apart.

        Raises:
            UserError: there is none.
        """
        lower = next_fallback(self.execution, stage)
        if lower is None or (not staged and lower[0].executor != self.execution.executor):
            wanted = "optimizer.states=cpu" if stage == "optimizer" else "a smaller model, execution.quantization=nf4"
            raise UserError(
                f"out of memory in stage {stage!r} of step {step} with the smallest settings; "
                f"{wanted} or a larger GPU is needed"
            )
        self.execution, given_up = lower
        self.parts.apply(self.execution)
        self._on_smaller(f"out of memory in stage {stage!r}: {given_up}")

    def _in_groups(self, work: Callable[[int], Tensor]) -> Tensor:
        while True:
            self.enter("sampled pictures")
            try:
                with normalize_oom_errors():
                    self.parts.use("decoder", "reward")
                    return work(self.execution.decode_images)
            except torch.OutOfMemoryError:
                pass
            self.smaller("reward", 0, staged=True)

    @torch.no_grad()
    def _scores(self, latents: Tensor, prompts: Sequence[str], size: int) -> Tensor:
        family = self.backbone.family
        parts = [
            self.score(family.decode(latents[i : i + size].to(family.dtype)), prompts[i : i + size])
            for i in range(0, len(prompts), size)
        ]
        return torch.cat(parts)
