"""From a base model and prompts to a consistency LoRA. No images are needed: the model is its own data."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqdf_fast.backbone import Backbone
from sqdf_fast.distill.accuracy import Accuracy, measure_accuracy
from sqdf_fast.distill.settings import Distillation
from sqdf_fast.distill.trajectories import Trajectories, guided_trajectories, lookaheads
from sqdf_fast.engine import RewardFunction
from sqdf_fast.engine.noise import Stream, generator, sample_seeds
from sqdf_fast.errors import UserError
from sqdf_fast.families import Family, load_family
from sqdf_fast.files import atomic_folder, disk_errors
from sqdf_fast.kernels.philox import derive_seed
from sqdf_fast.objective import look_ahead

Progress = Callable[[str, int, int, dict[str, float]], None]


def distill(
    model: str,
    prompts: Sequence[str],
    output: Path,
    settings: Distillation,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reward: RewardFunction | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a consistency LoRA for ``model`` and write it to the new folder ``output``.

    With it the network is a consistency function f(x_t, t) = c_skip x_t + c_out (a x_t + b m): one conditional call
    returns the x_0 that the guided model's probability-flow ODE reaches from x_t. ``output`` gets
    ``pytorch_lora_weights.safetensors`` (float16, diffusers format) and the summary as ``distillation.json``.

    Args:
        model: 'shapes', a diffusers folder, or a hub id; prompts: at least one, drawn in turn.
        device, dtype: of the frozen network; the LoRA is trained in float32 (float64 with float64).
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B]; adds its correlation to the closing table.
        progress: called with (stage, done, total, figures); stages: "trajectories", "training", "evaluation".

    Returns:
        The summary: settings, seconds of every stage, network evaluations, the mean loss of the last tenth
        of the steps, and ``accuracy``, the rows of :class:`Accuracy` at an early, a middle and a late state.

    Raises:
        UserError: ``output`` exists or cannot be written, no prompts, a model that cannot be loaded, float16,
            or a loss that stops being finite. Nothing is written then.
    """
    if not prompts:
        raise UserError("distillation without prompts: give at least one")
    if output.exists():
        raise UserError(f"output {output} exists; choose another folder or remove it first")
    with disk_errors(output):
        # Minutes of work must not end at a folder that cannot be written.
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if dtype == torch.float16:
        raise UserError("distillation in float16: its gradients underflow; use bfloat16 or float32")
    distiller = Distiller(load_family(model, device=device, dtype=dtype), prompts, settings, progress)
    summary = distiller.run(reward)
    with atomic_folder(output) as partial:
        distiller.save(partial)
        (partial / "distillation.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


class Distiller:
    """One distillation: the reference role is the teacher, the policy LoRA the student.

    Args:
        family: the base model; prompts: drawn in turn; progress: see :func:`distill`.

    Raises:
        UserError: settings that do not fit the model.
    """

    def __init__(
        self, family: Family, prompts: Sequence[str], settings: Distillation, progress: Progress | None = None
    ) -> None:
        self.settings, self.prompts, self.progress = settings, list(prompts), progress
        self.schedule = family.schedule(settings.num_inference_steps, eta=1.0)
        self.lookahead = lookaheads(self.schedule)[0].to(family.device, family.precision)
        self.backbone = Backbone(
            family,
            rank=settings.rank,
            target_modules=settings.target_modules,
            seed=derive_seed(settings.seed, Stream.LORA) & (2**63 - 1),
        )
        for checkpointed in self.backbone.checkpointed:
            checkpointed.enabled = settings.gradient_checkpointing
        self.parameters = list(self.backbone.policy_parameters.values())

    def run(self, reward: RewardFunction | None = None) -> dict[str, Any]:
        """Sample, train, measure; returns the summary. Then the policy LoRA is what :meth:`save` writes."""
        start = time.monotonic()
        trajectories = self.sample()
        sampled = time.monotonic()
        loss = self.train(trajectories)
        trained = time.monotonic()
        accuracy = self.measure(reward)
        seconds = {"trajectories": sampled - start, "training": trained - sampled}
        seconds["evaluation"] = time.monotonic() - trained
        return {
            "settings": self.settings.model_dump(mode="json"),
            "seconds": {stage: round(duration, 1) for stage, duration in seconds.items()},
            "network_evaluations": self.backbone.evaluations,
            "lora_parameters": sum(parameter.numel() for parameter in self.parameters),
            "loss": loss,
            "accuracy": [asdict(row) for row in accuracy],
        }

    def sample(self) -> Trajectories:
        """The teacher's trajectories; a share ``stochastic`` of them begins with noisy steps."""
        n, steps = self.settings.num_trajectories, len(self.schedule)
        draw = generator(self.settings.seed, Stream.DISTILL, 0)
        branch = torch.randint(steps, (n,), generator=draw)
        branch[torch.rand(n, generator=draw) >= self.settings.stochastic] = 0
        return guided_trajectories(
            self.backbone,
            self.schedule,
            self._prompts(n),
            sample_seeds(self.settings.seed, Stream.DISTILL, 1, n),
            branch,
            guidance_scale=self.settings.guidance_scale,
            batch_size=self.settings.sampling_batch_size,
            on_progress=lambda done, total: self._report("trajectories", done, total),
        )

    def train(self, trajectories: Trajectories) -> float:
        """Optimize the LoRA on the trajectories; returns the mean loss of the last tenth of the steps.

        Raises:
            UserError: the loss is not finite.
        """
        settings = self.settings
        optimizer = torch.optim.Adam(self.parameters, lr=settings.lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        draw = generator(settings.seed, Stream.DISTILL, 2)
        # Every state is equally likely, none before its trajectory's branch.
        usable = (trajectories.branch[:, None] <= torch.arange(trajectories.states.shape[1])).double()
        weights = (usable / usable.sum(0).clamp(min=1)).flatten()
        losses = []
        for step in range(settings.steps):
            chosen = torch.multinomial(weights, settings.batch_size, replacement=True, generator=draw)
            losses.append(self._accumulate(trajectories, chosen // len(self.schedule), chosen % len(self.schedule)))
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss became {losses[-1]} at step {step}; lower lr (it is {settings.lr})")
            nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            self._report("training", step + 1, settings.steps, loss=losses[-1])
        for parameter in self.parameters:
            # What is measured is what is saved.
            parameter.data = parameter.data.half().to(parameter.dtype)
        tail = losses[-max(1, len(losses) // 10) :]
        return sum(tail) / len(tail)

    def measure(self, reward: RewardFunction | None = None) -> list[Accuracy]:
        """The look-ahead's accuracy at an early, a middle and a late state of fresh noisy trajectories."""
        n, steps = self.settings.evaluation_trajectories, len(self.schedule)
        return measure_accuracy(
            self.backbone,
            self.schedule,
            self._prompts(n),
            sample_seeds(self.settings.seed, Stream.DISTILL, 3, n),
            sorted({min(1, steps - 1), steps // 2, steps * 4 // 5}),
            role="policy",
            guidance_scale=self.settings.guidance_scale,
            batch_size=self.settings.sampling_batch_size,
            reward=reward,
            on_progress=lambda done, total: self._report("evaluation", done, total),
        )

    def save(self, folder: Path) -> None:
        """Write ``folder/pytorch_lora_weights.safetensors`` in float16; the end of this LoRA's training."""
        for parameter in self.parameters:
            parameter.data = parameter.data.half()
        self.backbone.family.save_lora(folder, "policy")

    def _accumulate(self, trajectories: Trajectories, row: Tensor, state: Tensor) -> float:
        family, size = self.backbone.family, self.settings.micro_batch_size
        total = 0.0
        for rows, states in zip(row.split(size), state.split(size), strict=True):
            x = trajectories.states[rows, states].to(family.device, family.precision)
            target = trajectories.x0[rows].to(family.device, family.precision)
            conditioning = family.encode([trajectories.prompts[i] for i in rows])
            network = partial(self.backbone.predict, conditioning=conditioning)
            with self.backbone.role("policy"):
                estimate = look_ahead(x, states.to(family.device), self.lookahead, network)
            loss = pseudo_huber(estimate - target) * (len(rows) / len(row))
            loss.backward()
            total += loss.item()
        return total

    def _prompts(self, count: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(count)]

    def _report(self, stage: str, done: int, total: int, **figures: float) -> None:
        if self.progress:
            self.progress(stage, done, total, figures)


def pseudo_huber(difference: Tensor, c: float = 0.1) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c over all elements: d^2 / 2c near 0, |d| far from it (arXiv 2310.14189).

    Latents have unit scale. On the shapes model c = 0.02 and c = 1 end within 10 % of the default's error.
    """
    return (difference.square() + c**2).sqrt().mean() - c
