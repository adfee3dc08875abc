"""What a run computes with: model, sampler, reward, and where their weights are, built from a configuration alone.

Training, sampling, evaluation, comparisons and the planner all run through a :class:`Runtime`: what is simulated is
what runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

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
from sqdf_fast.kernels import denoise_step
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward, checked_reward
from sqdf_fast.schedule import DenoisingSchedule

T = TypeVar("T")


class Progress(Protocol):
    """Where a run shows what it is doing; :mod:`sqdf_fast.display.progress` has those for a terminal."""

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Name what is being done, and how far it is where it takes long."""

    def message(self, text: str) -> None:
        """Show a line that stays."""


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
        meter: of the stages; default: one for the backbone's device.
        stop: set by whoever wants the run to stop; asked between network calls.
        progress: shown phases and out-of-memory fallbacks.

    Attributes:
        execution: how a step is computed now; an out-of-memory fallback replaces it by a smaller one.
        stage: the current or last stage.
        reward_evaluations: images scored so far; the backbone counts the network's rows.
        fallbacks: what was given up since the list was last cleared.
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
        self.sampler = self._make_sampler()
        self.groups = groups or ModuleGroups(backbone, reward)
        self.execution: Execution = config.execution
        self.groups.apply(self.execution)
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
            prompts: all that it will be asked for: they are encoded now, and the text encoders are freed.
            policy: folder of a trained LoRA or network to start from; None: a fresh one.

        Raises:
            UserError: a device, model or adapter that cannot be loaded or does not fit the configuration.
        """
        backbone = load_backbone(config, policy)
        backbone.family.encode_all(["", *prompts])
        backbone.family.release_text_encoders()
        return cls(config, backbone, reward, stop=stop, progress=progress)

    def check_stop(self) -> None:
        """Raises Interrupted once somebody has asked the run to stop."""
        if self.stop.is_set():
            raise Interrupted

    def memory(self) -> tuple[int | None, int]:
        """Bytes alive now, None on a CPU, and the most so far: of the whole process where no allocator counts them."""
        return self.meter.live_bytes, self.meter.peak_bytes or process_peak_bytes()

    def begin(self, stage: str, *needed: ModuleGroup) -> None:
        """Begin ``stage``: drop the offloaded weights that it does not need, then upload those that it needs."""
        self.groups.leave(*needed)
        self.enter(stage)
        self.groups.use(*needed)

    def enter(self, stage: str) -> None:
        """Begin ``stage`` for the meter; weights stay where they are."""
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
            UserError: the reward fails or returns something that is no reward; Interrupted.
        """
        assert self.reward is not None
        self.check_stop()
        self.reward_evaluations += len(prompts)
        return checked_reward(self.reward, images, prompts)

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rewards [B] of the images that latents [B, ...] decode to, with their graph."""
        return decoded_reward(self.family, self.score, latents, prompts)

    @torch.no_grad()
    def divergence(self, states: Tensor, prompts: Sequence[str]) -> Tensor:
        """KL of one step between policy and reference, at one state of each trajectory: [n] float32 on the CPU.

        The states take turns along the schedule, so that the mean over many trajectories is that over its trainable
        steps. Mean over the elements of a sample, without the factor 1/2, times ``objective.kl_scale``.

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
        """Add the gradient of the SQDF loss to the policy's parameters, as ``execution`` says.

        Raises:
            UserError: the reward misbehaves; torch.OutOfMemoryError: gradients are incomplete then.
        """
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
        """``call()``, again after each ``shrink()`` while memory runs out; a failed attempt counts nothing.

        Raises:
            UserError: ``shrink`` has nothing left to give up.
        """
        evaluations, scored = self.backbone.evaluations, self.reward_evaluations
        while True:
            self.backbone.evaluations, self.reward_evaluations = evaluations, scored
            try:
                with normalize_oom_errors():
                    return call()
            except torch.OutOfMemoryError:
                # Shrink outside the handler: until it ends, the failed call's tensors are alive.
                pass
            shrink()

    def fewer_samples(self, phase: str) -> None:
        """Half the samples a network call, then offloaded weights. Raises UserError when nothing is left."""
        size = self.sampler.batch_size
        if size > 1:
            self.sampler.batch_size = size // 2
            self._give_up(f"out of memory while {phase}: sampling.batch_size {size} -> {size // 2}")
        else:
            self._offload(f"while {phase}", "one image at a time does not fit; use a smaller model or a larger GPU")

    def fewer_images(self) -> None:
        """Half the images decoded at once, then offloaded weights. Raises UserError when nothing is left."""
        size = self.execution.decode_images
        if size > 1:
            self.execution = self.execution.model_copy(update={"decode_images": size // 2})
            self._give_up(f"out of memory while decoding: decode_images {size} -> {size // 2}")
        else:
            self._offload("while decoding", "one image at a time does not fit; lower resolution or use a larger GPU")

    def fall_back(self, step: int, *, staged: bool) -> None:
        """A smaller execution for the stage of an optimizer step that ran out of memory.

        Args:
            step: optimizer step, from 1, for the message; staged: whether the staged executor may replace the joint
                graph.

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
        """Compute as ``execution`` says from now on."""
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
        family, tables = self.family, self.sampler.tables
        x, index = x.to(family.device, family.precision), index.to(family.device)
        conditioning, unconditional = family.encode(prompts), family.unconditional(self.guidance_scale)
        outputs: dict[Role, Tensor] = {}
        roles: tuple[Role, ...] = ("policy", "reference")
        for role in roles:
            with self.backbone.role(role):
                outputs[role] = self.backbone.predict(x, tables.timesteps[index], conditioning, unconditional)
        _, kl = denoise_step(
            x,
            outputs["policy"],
            outputs["reference"],
            tables.transition,
            index,
            guidance_scale=self.guidance_scale,
            noise=torch.zeros_like(x),
            kl_scale=self.config.objective.kl_scale,
            impl=self.config.impl,
        )
        return kl.float().cpu()

    def _make_sampler(self) -> Sampler:
        """Along the family's own scheduler, or in multistep consistency sampling."""
        config, settings = self.config, self.config.sampling
        options: dict[str, Any] = {
            "guidance_scale": self.guidance_scale,
            "batch_size": settings.batch_size,
            "merge_lora": settings.merge_lora,
            "channels_last": settings.channels_last,
            "compilation": settings.compile,
            "impl": config.impl,
        }
        if config.policy.base == "consistency":
            schedule = DenoisingSchedule.consistency_sampling(self.family.scheduler, settings.num_inference_steps)
        else:
            schedule = self.family.schedule(settings.num_inference_steps, settings.eta)
        return Sampler(self.backbone, schedule, **options)
