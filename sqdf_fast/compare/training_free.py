"""Runs that train nothing: better sampling of the base model, one evaluation for each strength."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sqdf_fast.compare.jobs import Job, TrainingFreeSpec, check_settings
from sqdf_fast.engine.rollouts import decode_images
from sqdf_fast.engine.runtime import HeldOut, load_backbone, make_sampler, pick_dtype
from sqdf_fast.evaluate import evaluate_images, load_judges
from sqdf_fast.files import disk_errors
from sqdf_fast.guided_sampling import TrainingFree, training_free
from sqdf_fast.rewards import checked_reward, load_reward
from sqdf_fast.runs import MetricsLog, read_metrics, save_samples
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.runs.metrics import Record

# At this strength each of them is plain sampling.
PLAIN = {"best-of-n": 1.0, "guided": 0.0}


class SamplingStopped(Exception):
    """The user asked to stop; the strengths that are evaluated stay."""


def sample_training_free(job: Job, spec: TrainingFreeSpec, interrupted: Callable[[], bool]) -> None:
    """Evaluate each strength that the run folder has no record of. Costs are those of one picture.

    Raises:
        UserError: the folder is of other settings; what the sampling refuses. SamplingStopped.
    """
    run, config = RunFolder(job.folder), job.config
    if run.config.exists() and run.metrics.exists():
        check_settings(job)
    else:
        with disk_errors(job.folder):
            shutil.rmtree(job.folder, ignore_errors=True)
        RunFolder.create(job.folder, config)
    sampled = _Sampled(job, spec, interrupted)
    with MetricsLog(run.metrics) as log:
        for number in range(len(read_metrics(run.metrics)), len(spec.sweep)):
            log.append(sampled.evaluate(number))
        log.append({"kind": "end", "step": len(spec.sweep) - 1, "reason": "steps"})


class _Sampled:
    """The base model with all that judges it, loaded once for all strengths."""

    def __init__(self, job: Job, spec: TrainingFreeSpec, interrupted: Callable[[], bool]) -> None:
        config = job.config
        self.job, self.spec, self.interrupted = job, spec, interrupted
        self.held_out = HeldOut.of(config)
        self.backbone = load_backbone(config)
        self.sampler = make_sampler(config, self.backbone)
        family, evaluation = self.backbone.family, config.evaluation
        dtype = pick_dtype(config.dtype, family.device)
        self.reward = load_reward(config.reward, device=family.device, dtype=dtype, **config.reward_options)
        self.reward.encode_prompts(list(dict.fromkeys(self.held_out.prompts)))
        self.judges = load_judges(
            config.model, self.reward, evaluation.judges, evaluation.held_out, evaluation.judge_options, dtype
        )
        self._base: Tensor | None = None

    def evaluate(self, number: int) -> Record:
        """The record of one strength, its pictures saved."""
        started = time.monotonic()
        prompts, strength = self.held_out.prompts, self.spec.sweep[number]
        found = self._sample(strength)
        seconds = time.monotonic() - started
        images = self._decode(found)
        there = images.to(self.backbone.family.device)
        base = self._base_embeddings(strength, there)
        by_prompt: dict[str, list[float]] = {}
        scores = evaluate_images(there, prompts, self.reward, self.judges, base=base, by_prompt=by_prompt)
        self._save(number, images)
        return {
            "kind": "evaluation",
            "step": number,
            "strength": strength,
            **scores,
            "better": self.judges.better,
            "by_prompt": by_prompt,
            "spent_unet_evaluations": found.cost.unet_evaluations / len(prompts),
            "spent_reward_evaluations": found.cost.reward_evaluations / len(prompts),
            "spent_seconds": seconds / len(prompts),
        }

    def _sample(self, strength: float) -> TrainingFree:
        kind = self.spec.kind
        options: dict[str, Any] = {"candidates": int(strength)} if kind == "best-of-n" else {"scale": strength}
        return training_free(
            kind,
            self.backbone,
            self.sampler,
            self._score,
            self.held_out.prompts,
            self.held_out.seeds,
            on_progress=lambda done, total: self._stop_if_asked(),
            **options,
        )

    def _decode(self, found: TrainingFree) -> Tensor:
        return decode_images(self.backbone.family, found.x0, self.job.config.sampling.batch_size)

    def _base_embeddings(self, strength: float, there: Tensor) -> Tensor:
        """Of the base model's own pictures: those of the plain strength, or drawn once for strengths without it."""
        if self._base is None:
            plain = PLAIN[self.spec.kind]
            if strength != plain:
                there = self._decode(self._sample(plain)).to(there.device)
            self._base = self.judges.embed(there)
        return self._base

    def _save(self, number: int, images: Tensor) -> None:
        evaluation = self.job.config.evaluation
        # As the trainer keeps them: one of each prompt first.
        each = evaluation.images_per_prompt
        order = sorted(range(len(images)), key=lambda i: (i % each, i))[: evaluation.grid]
        prompts, seeds = [self.held_out.prompts[i] for i in order], self.held_out.seeds[order].tolist()
        save_samples(self.job.folder, number, images[order], prompts, seeds)

    def _score(self, images: Tensor, prompts: Any) -> Tensor:
        self._stop_if_asked()
        scores: Tensor = checked_reward(self.reward, images, prompts)
        return scores

    def _stop_if_asked(self) -> None:
        if self.interrupted():
            raise SamplingStopped
