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
    held_out = HeldOut.of(config)
    reward = load_run_reward(config, held_out.prompts)
    runtime = Runtime.load(config, prompts=held_out.prompts, reward=reward, stop=stop)
    evaluator = Evaluator(config, reward, held_out)
    with MetricsLog(run.metrics) as log:
        for number in range(len(read_metrics(run.metrics)), len(spec.sweep)):
            log.append(_evaluate(job, spec, number, runtime, evaluator))
        log.append({"kind": "end", "step": len(spec.sweep) - 1, "reason": "steps"})


def _evaluate(job: Job, spec: TrainingFreeSpec, number: int, runtime: Runtime, evaluator: Evaluator) -> Record:
    """Save the images of one strength and return its record."""
    prompts, strength = evaluator.held_out.prompts, spec.sweep[number]

    def sample(strength: float) -> TrainingFree:
        options: dict[str, Any] = {"candidates": int(strength)} if spec.kind == "best-of-n" else {"scale": strength}
        return training_free(spec.kind, runtime, prompts, evaluator.held_out.seeds, **options)

    def judge(images: Tensor, *, is_base: bool) -> dict[str, Any]:
        runtime.begin("judging", "reward")
        return evaluator.judge(images, runtime.family.device, is_base=is_base).record()

    started = time.monotonic()
    sampled = sample(strength)
    seconds, images = time.monotonic() - started, runtime.decode(sampled.x0)
    if evaluator.base is None and strength != PLAIN[spec.kind]:
        # Distances are measured from the base model's images.
        judge(runtime.decode(sample(PLAIN[spec.kind]).x0), is_base=True)
    scores = judge(images, is_base=evaluator.base is None)
    evaluator.keep_samples(job.folder, number, images)
    return {
        "kind": "evaluation",
        "step": number,
        "strength": strength,
        **scores,
        "spent_unet_evaluations": sampled.cost.unet_evaluations / len(prompts),
        "spent_reward_evaluations": sampled.cost.reward_evaluations / len(prompts),
        "spent_seconds": seconds / len(prompts),
    }
