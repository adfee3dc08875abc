"""What a run computes with: model, sampler, reward and their weights, built from a configuration alone.

Training, sampling, evaluation, comparisons and the planner all run through a :class:`Runtime`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Config, Execution
from sqdf_fast.engine import make_executor
from sqdf_fast.engine.executor import Executor, StepResult, decoded_reward
from sqdf_fast.engine.loading import load_backbone
from sqdf_fast.engine.meters import StageMeter, process_peak_bytes
from sqdf_fast.engine.module_groups import ModuleGroup, ModuleGroups
from sqdf_fast.engine.oom_fallback import next_fallback, normalize_oom_errors, offloaded
from sqdf_fast.engine.sampler import Keep, Sampler, Trajectories
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.families import Conditioning
from sqdf_fast.kernels import denoise_step
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward, checked_reward
from sqdf_fast.schedule import DenoisingSchedule

T = TypeVar("T")


class Progress(Protocol):
    """Shows phases, with their progress, and lines that stay; see :mod:`sqdf_fast.display.progress`."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None: ...

    def message(self, text: str) -> None: ...


class NoProgress:
    """Shows nothing."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None: ...

    def message(self, text: str) -> None: ...


class Runtime:
    """Samples, decodes, scores and takes gradients, a few rows or images at a time, and fewer when memory runs out.

    Args:
        config: of the run, validated.
        backbone: network and roles; reward: None where nothing is scored.
        groups: modules to checkpoint and offload; default: those of backbone and reward.
        meter: stage meter; default: one for the backbone's device.
        stop: flag that stops the run, checked between network calls.
        progress: display of phases and out-of-memory fallbacks.

    Attributes:
        execution: current settings of a step; an out-of-memory fallback replaces them by smaller ones.
        stage: the current or last stage.
        reward_evaluations: images scored so far; the backbone counts the network's rows.
        fallbacks: out-of-memory fallbacks since the list was last cleared.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        reward: Reward | None = None,
        *,
        groups: ModuleGroups | None = None,
        meter: StageMeter | None = None,
        stop: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.backbone, self.family, self.reward = config, backbone, backbone.family, reward
        self.guidance_scale = config.sampling.guidance_scale if self.family.guided else 1.0
        sampling, family = config.sampling, self.family
        self.sampler = Sampler(
            backbone,
            DenoisingSchedule.consistency_sampling(family.scheduler, sampling.num_inference_steps)
            if config.policy.base == "consistency"
            else family.schedule(sampling.num_inference_steps, sampling.eta),
            guidance_scale=self.guidance_scale,
            batch_size=sampling.batch_size,
            merge_lora=sampling.merge_lora,
            channels_last=sampling.channels_last,
            compilation=sampling.compile,
            impl=config.impl,
        )
        self.groups = groups or ModuleGroups(backbone, reward)
        self.execution: Execution
        self.use(config.execution)
        self.meter = meter or StageMeter(self.family.device)
        self.stop, self.progress = stop or threading.Event(), progress or NoProgress()
        self.stage = ""
        self.reward_evaluations = 0
        self.fallbacks: list[str] = []
        self._executor: Executor | None = None

    @classmethod
    def load(
        cls,
        config: Config,
        *,
        prompts: Sequence[str],
        policy: str | None = None,
        reward: Reward | None = None,
        stop: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Runtime:
        """The runtime of a configuration, its weights loaded.

        Args:
            prompts: every prompt of the run: they are encoded now, and the text encoders are freed.
            policy: folder of a trained LoRA or network to start from; None: a new one.

        Raises:
            UserError: a device, model or adapter cannot be loaded or does not fit the configuration.
        """
        backbone = load_backbone(config, policy)
        backbone.family.encode_all(["", *prompts])
        backbone.family.release_text_encoders()
        return cls(config, backbone, reward, stop=stop, progress=progress)

    def check_stop(self) -> None:
        """Raises Interrupted once the stop flag is set."""
        if self.stop.is_set():
            raise Interrupted

    def memory(self) -> tuple[int | None, int]:
        """Bytes alive now (None on a CPU) and peak bytes (on a CPU, of the whole process)."""
        return self.meter.live_bytes, self.meter.peak_bytes or process_peak_bytes()

    def begin(self, stage: str, *needed: ModuleGroup) -> None:
        """Begin ``stage``: drop the offloaded weights that it does not need, then upload those that it needs."""
        self.groups.leave(*needed)
        self.enter(stage)
        self.groups.use(*needed)

    def enter(self, stage: str) -> None:
        """Begin ``stage`` for the meter alone."""
        self.stage = stage
        self.meter(stage)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        phase: str = "sampling",
        *,
        role: Role = "policy",
        keep: Keep = "none",
        stop: int | None = None,
    ) -> Trajectories:
        """Trajectories of a role, see :meth:`Sampler.sample`.

        Raises:
            UserError: not even one image fits the memory; Interrupted.
        """

        def report(done: int, total: int) -> None:
            self.check_stop()
            self.progress.phase(phase, done, total)

        def attempt() -> Trajectories:
            self.begin("sampling", *self.groups.of_role(role))
            return self.sampler.sample(prompts, seeds, role=role, keep=keep, stop=stop, on_progress=report)

        return self.retry(attempt, lambda: self.fewer_samples(phase))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, ...] to images [n, 3, H, W], float32 in [0, 1] on the CPU."""

        def attempt() -> Tensor:
            self.begin("sampled images", "decoder")
            parts = latents.split(self.execution.decode_images)
            return torch.cat([self.family.decode(part.to(self.family.dtype)).float().cpu() for part in parts])

        return self.retry(attempt, self.fewer_images)

    @torch.no_grad()
    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rewards of the images that latents [n, ...] decode to: [n], without a graph."""

        def attempt() -> Tensor:
            self.begin("sampled images", "decoder", "reward")
            size = self.execution.decode_images
            parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
            return torch.cat([self.score_latents(latents[part], prompts[part]) for part in parts])

        return self.retry(attempt, self.fewer_images)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The reward of each image, [B], with its graph.

        Raises:
            UserError: the reward fails or returns invalid values; Interrupted.
        """
        assert self.reward is not None
        self.check_stop()
        self.reward_evaluations += len(prompts)
        return checked_reward(self.reward, images, prompts)

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rewards [B] of the images that latents [B, ...] decode to, with their graph."""
        return decoded_reward(self.family, self.score, latents, prompts)

    def output(self, role: Role, x: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output in a role at x_t, with the graph of what it depends on.

        Args:
            x: [B, ...]; index: [B] int64, positions in the schedule; both on the device.

        Returns:
            [2B, ...] ordered [unconditional; conditional], or [B, ...] without guidance: what the kernels take.
        """
        unconditional = self.family.unconditional(self.guidance_scale)
        with self.backbone.role(role):
            return self.backbone.predict(x, self.sampler.tables.timesteps[index], conditioning, unconditional)

    def step(
        self,
        x: Tensor,
        index: Tensor,
        conditioning: Conditioning,
        *,
        noise: Tensor | None = None,
        seed: Tensor | None = None,
        table: Tensor | None = None,
        kl_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The policy's x_{t-1} [B, ...], and its KL to the reference [B], with the policy's graph.

        Args:
            x, index, conditioning: as for :meth:`output`; noise, seed: z shaped like x, or int64 [B]; exactly one.
            table: [T, 3], p, q and sigma; default: the sampler's; kl_scale: default: the objective's.
        """
        with torch.no_grad():
            reference = self.output("reference", x, index, conditioning)
        return denoise_step(
            x,
            self.output("policy", x, index, conditioning),
            reference,
            self.sampler.tables.transition if table is None else table,
            index,
            guidance_scale=self.guidance_scale,
            noise=noise,
            seed=seed,
            kl_scale=self.config.objective.kl_scale if kl_scale is None else kl_scale,
            impl=self.config.impl,
        )

    @torch.no_grad()
    def divergence(self, states: Tensor, prompts: Sequence[str]) -> Tensor:
        """KL of one step between policy and reference, at one state of each trajectory: [n] float32 on the CPU.

        The states cycle through the trainable indices. Mean over the elements of a sample, without the factor 1/2,
        times ``objective.kl_scale``.

        Args:
            states: x_t at the schedule's K trainable indices, [n, K, ...]; prompts: n.
        """
        turn = torch.arange(len(states)) % states.shape[1]
        x = states[torch.arange(len(states)), turn]
        index = torch.nonzero(self.sampler.schedule.trainable.cpu(), as_tuple=True)[0][turn]

        def attempt() -> Tensor:
            self.begin("divergence", "network")
            size = self.sampler.batch_size
            parts = [slice(start, start + size) for start in range(0, len(x), size)]
            return torch.cat([self._divergence(x[part], index[part], prompts[part]) for part in parts])

        return self.retry(attempt, lambda: self.fewer_samples("evaluating"))

    def gradient(self, batch: ReplayBatch, seeds: Tensor) -> StepResult:
        """Add the gradient of the SQDF loss to the policy's parameters. Raises as :meth:`Executor.accumulate`."""
        if self._executor is None or self._executor.execution is not self.execution:
            self._executor = make_executor(
                self.backbone,
                self.sampler.schedule,
                self.score,
                self.config.objective,
                guidance_scale=self.guidance_scale,
                execution=self.execution,
                groups=self.groups,
                impl=self.config.impl,
            )
            self._executor.on_stage = self.enter
        return self._executor.accumulate(batch, seeds)

    def retry(self, call: Callable[[], T], shrink: Callable[[], None]) -> T:
        """``call()``, retried after ``shrink()`` while memory runs out; a failed attempt does not count as a cost.

        Raises:
            UserError: ``shrink`` has no smaller setting left.
        """
        evaluations, scored = self.backbone.evaluations, self.reward_evaluations
        while True:
            self.backbone.evaluations, self.reward_evaluations = evaluations, scored
            try:
                with normalize_oom_errors():
                    return call()
            except torch.OutOfMemoryError:
                pass
            # Outside the handler, which keeps the failed call's tensors alive.
            shrink()

    def fewer_samples(self, phase: str) -> None:
        """Halve the samples per network call, then offload weights. Raises UserError when nothing is left."""
        size = self.sampler.batch_size
        if size > 1:
            self.sampler.batch_size = size // 2
            self._give_up(f"out of memory while {phase}: sampling.batch_size {size} -> {size // 2}")
        else:
            self._offload(f"while {phase}", "one image at a time does not fit; use a smaller model or a larger GPU")

    def fewer_images(self) -> None:
        """Halve the images decoded at once, then offload weights. Raises UserError when nothing is left."""
        size = self.execution.decode_images
        if size > 1:
            self.execution = self.execution.model_copy(update={"decode_images": size // 2})
            self._give_up(f"out of memory while decoding: decode_images {size} -> {size // 2}")
        else:
            self._offload("while decoding", "one image at a time does not fit; lower resolution or use a larger GPU")

    def fall_back(self, step: int, *, staged: bool) -> None:
        """Choose a smaller execution for the stage of an optimizer step that ran out of memory.

        Args:
            step: optimizer step, from 1; staged: whether the staged executor may replace the joint graph.

        Raises:
            UserError: the settings are the smallest already.
        """
        lower = next_fallback(self.execution, self.stage)
        if lower is None or (not staged and lower[0].executor != self.execution.executor):
            wanted = "optimizer.states=cpu" if self.stage == "optimizer" else "execution.quantization=nf4"
            raise UserError(
                f"out of memory in stage {self.stage!r} of step {step} with the smallest settings; "
                f"set {wanted}, or use a smaller model or a larger GPU"
            )
        self.use(lower[0])
        self._give_up(f"out of memory in stage {self.stage!r}: {lower[1]}")

    def use(self, execution: Execution) -> None:
        """Apply ``execution`` from now on."""
        self.execution = execution
        self.groups.apply(execution)

    def _offload(self, where: str, refusal: str) -> None:
        lower = offloaded(self.execution)
        if lower is None:
            raise UserError(f"out of memory {where}: {refusal}")
        self.use(lower[0])
        self._give_up(f"out of memory {where}: {lower[1]}")

    def _give_up(self, what: str) -> None:
        self.meter.drop_step()
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()
        self.fallbacks.append(what)
        self.progress.message(what)

    def _divergence(self, x: Tensor, index: Tensor, prompts: Sequence[str]) -> Tensor:
        x, index = x.to(self.family.device, self.family.precision), index.to(self.family.device)
        _, kl = self.step(x, index, self.family.encode(prompts), noise=torch.zeros_like(x))
        return kl.float().cpu()
