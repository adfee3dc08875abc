"""Runs without training: better sampling of the base model, one evaluation per strength."""

from __future__ import annotations

import shutil
import threading
import time
from typing import Any

from torch import Tensor

from sqdf_fast.compare.jobs import Job, TrainingFreeSpec, check_settings
from sqdf_fast.engine.loading import load_run_reward
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.files import disk_errors
from sqdf_fast.guided_sampling import TrainingFree, training_free
from sqdf_fast.runs import MetricsLog, read_metrics
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.runs.metrics import Record
from sqdf_fast.training.evaluator import Evaluator, HeldOut

# Strength of plain sampling.
PLAIN = {"best-of-n": 1.0, "guided": 0.0}


def sample_training_free(job: Job, spec: TrainingFreeSpec, stop: threading.Event) -> None:
    """Evaluate each strength that the run folder has no record of. Costs are per image.

    Raises:
        UserError: the folder has other settings, or the sampling refuses them.
        Interrupted: the user stopped it; evaluated strengths stay.
    """
    run, config = RunFolder(job.folder), job.config
    if run.config.exists() and run.metrics.exists():
        check_settings(job)
    else:
        with disk_errors(job.folder):
            shutil.rmtree(job.folder, ignore_errors=True)
        RunFolder.create(job.folder, config)
    sampled = _Sampled(job, spec, stop)
    with MetricsLog(run.metrics) as log:
        for number in range(len(read_metrics(run.metrics)), len(spec.sweep)):
            log.append(sampled.evaluate(number))
        log.append({"kind": "end", "step": len(spec.sweep) - 1, "reason": "steps"})


class _Sampled:
    """The base model and its judges, loaded once for all strengths."""

    def __init__(self, job: Job, spec: TrainingFreeSpec, stop: threading.Event) -> None:
        config = job.config
        self.job, self.spec = job, spec
        held_out = HeldOut.of(config)
        reward = load_run_reward(config, held_out.prompts)
        self.runtime = Runtime.load(config, prompts=held_out.prompts, reward=reward, stop=stop)
        self.evaluator = Evaluator(config, reward, held_out)

    def evaluate(self, number: int) -> Record:
        """Save the images of one strength and return its record."""
        started = time.monotonic()
        evaluator, strength = self.evaluator, self.spec.sweep[number]
        sampled = self._sample(strength)
        seconds, count = time.monotonic() - started, len(evaluator.held_out.prompts)
        images = self.runtime.decode(sampled.x0)
        if evaluator.base is None and strength != PLAIN[self.spec.kind]:
            # Distances are measured from the base model's images.
            self._judge(self.runtime.decode(self._sample(PLAIN[self.spec.kind]).x0), is_base=True)
        scores = self._judge(images, is_base=evaluator.base is None)
        evaluator.keep_samples(self.job.folder, number, images)
        return {
            "kind": "evaluation",
            "step": number,
            "strength": strength,
            **scores,
            "spent_unet_evaluations": sampled.cost.unet_evaluations / count,
            "spent_reward_evaluations": sampled.cost.reward_evaluations / count,
            "spent_seconds": seconds / count,
        }

    def _judge(self, images: Tensor, *, is_base: bool) -> dict[str, Any]:
        self.runtime.begin("judging", "reward")
        return self.evaluator.judge(images, self.runtime.family.device, is_base=is_base).record()

    def _sample(self, strength: float) -> TrainingFree:
        kind, held_out = self.spec.kind, self.evaluator.held_out
        options: dict[str, Any] = {"candidates": int(strength)} if kind == "best-of-n" else {"scale": strength}
        return training_free(kind, self.runtime, held_out.prompts, held_out.seeds, **options)
