"""Held-out prompts and judges, for evaluations in training, of finished models, and in comparisons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.backbone import Role
from sqdf_fast.config import Config
from sqdf_fast.engine.loading import pick_device, pick_dtype
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.evaluate import evaluate_images, load_judges
from sqdf_fast.prompts import load_prompts
from sqdf_fast.rewards import Reward
from sqdf_fast.runs import save_samples


@dataclass(frozen=True)
class HeldOut:
    """The N prompts and seeds, [N] int64, that every evaluation of a run samples."""

    prompts: list[str]
    seeds: Tensor

    @staticmethod
    def of(config: Config, seed: int = 0) -> HeldOut:
        """A fixed choice among the held-out prompts, each ``images_per_prompt`` times.

        The seed is not the run's, so that all runs are evaluated on the same noise.
        """
        evaluation = config.evaluation
        pool = load_prompts(evaluation.prompts or config.prompts)
        count = min(evaluation.num_prompts, len(pool))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
        chosen = [pool[i] for i in sorted(order[:count].tolist())]
        prompts = [prompt for prompt in chosen for _ in range(evaluation.images_per_prompt)]
        return HeldOut(prompts, sample_seeds(seed, Stream.EVALUATION, 0, len(prompts)))


@dataclass(frozen=True)
class Scores:
    """Scores of the images of the held-out prompts.

    Attributes:
        values: the ``eval_*`` values of :func:`sqdf_fast.evaluate.evaluate_images`; by_prompt: means, by judge.
        better: which direction is good, by judge; diversity_measure: what its diversity compares.
    """

    values: dict[str, float | None]
    by_prompt: dict[str, list[float]]
    better: dict[str, Any]
    diversity_measure: str | None

    def record(self) -> dict[str, Any]:
        """The fields of an evaluation in metrics.jsonl."""
        return {
            **self.values,
            "diversity_measure": self.diversity_measure,
            "better": self.better,
            "by_prompt": self.by_prompt,
        }


@dataclass(frozen=True)
class Evaluation:
    """One evaluation in training; images: float32 [N, 3, H, W] in [0, 1] on the CPU, kl: mean of one step's."""

    scores: Scores
    images: Tensor
    kl: float
    seconds: float


class Evaluator:
    """Samples the held-out prompts and scores the images with reward and judges.

    Args:
        config: of the run; reward: the one that training maximizes.
        held_out: prompts and noise; default: the configuration's.
        judges: names that replace ``evaluation.judges``.
        prompts: every prompt that is scored; default: the held-out ones.

    Attributes:
        base: embeddings of the base model's images, from which distances are measured; None until they are judged.

    Raises:
        UserError: a judge or a held-out reward cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        reward: Reward,
        held_out: HeldOut | None = None,
        *,
        judges: Sequence[str] = (),
        prompts: Sequence[str] | None = None,
    ) -> None:
        self.config, self.reward = config, reward
        self.held_out = held_out or HeldOut.of(config)
        settings, dtype = config.evaluation, pick_dtype(config.dtype, pick_device(config.device))
        names = judges or settings.judges
        self.judges = load_judges(config.model, reward, names, settings.held_out, settings.judge_options, dtype)
        self.judges.encode_prompts(list(dict.fromkeys(self.held_out.prompts if prompts is None else prompts)))
        self.base: Tensor | None = None

    def evaluate(self, runtime: Runtime, *, is_base: bool) -> Evaluation:
        """Sample and judge the current policy; ``is_base``: whether it is still the base model."""
        started, prompts = time.monotonic(), self.held_out.prompts
        sampled = runtime.sample(prompts, self.held_out.seeds, "evaluating", keep="trainable")
        assert sampled.states is not None
        kl = float(runtime.divergence(sampled.states, prompts).mean())
        images = runtime.decode(sampled.x0)
        runtime.begin("judging", "reward")
        scores = self.judge(images, runtime.family.device, is_base=is_base)
        # Its stages belong to no optimizer step; the run's peak includes them.
        runtime.meter.drop_step()
        return Evaluation(scores, images, kl, time.monotonic() - started)

    def images(self, runtime: Runtime, *, role: Role = "policy", phase: str = "evaluating") -> Tensor:
        """A role's images of the held-out prompts, float32 [N, 3, H, W] in [0, 1] on the CPU."""
        return runtime.decode(runtime.sample(self.held_out.prompts, self.held_out.seeds, phase, role=role).x0)

    def judge(self, images: Tensor, device: torch.device, *, is_base: bool = False) -> Scores:
        """Scores of images [N, 3, H, W] of the held-out prompts, on the reward's ``device``.

        ``is_base``: whether they are the base model's, which later images are compared with.
        """
        images_on_device = images.to(device)
        if is_base:
            self.base = self.judges.embed(images_on_device)
        by_prompt: dict[str, list[float]] = {}
        values = evaluate_images(
            images_on_device, self.held_out.prompts, self.reward, self.judges, base=self.base, by_prompt=by_prompt
        )
        return Scores(values, by_prompt, self.judges.better, self.judges.diversity_measure)

    def keep_samples(self, folder: Path, step: int, images: Tensor) -> tuple[Tensor, list[str]]:
        """Save some of the images in a run folder: one of each prompt first, then the second of each, ...

        Returns:
            The saved images and their prompts.
        """
        each = self.config.evaluation.images_per_prompt
        order = sorted(range(len(images)), key=lambda i: (i % each, i))[: self.config.evaluation.grid]
        prompts = [self.held_out.prompts[i] for i in order]
        save_samples(folder, step, images[order], prompts, self.held_out.seeds[order].tolist())
        return images[order], prompts
