"""The training loop: collect, step, evaluate, save."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.algorithms import Algorithm
from sqdf_fast.config import Config
from sqdf_fast.display import TrainingProgress
from sqdf_fast.engine import StepResult
from sqdf_fast.engine.meters import EnergyMeter
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.optimizers import (
    allocate_states,
    clip_grad_norm,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.files import atomic_folder
from sqdf_fast.kernels.philox import derive_seed
from sqdf_fast.runs import MetricsLog, read_metrics
from sqdf_fast.runs.checkpoint import checkpoints, read_checkpoint, save_checkpoint
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.runs.trackers import Trackers
from sqdf_fast.training.cost import Cost, meter_cost
from sqdf_fast.training.evaluator import Evaluator
from sqdf_fast.training.records import evaluation_line, step_record
from sqdf_fast.training.watch import Watch


class Trainer:
    """One run's loop.

    Its state is (step, evaluated, spent), policy, optimizer and the algorithm's own. Every random number derives from
    the run's seed and these counters, so a resumed run equals the uninterrupted one bit for bit (on one machine and
    version, on the CPU). ``updating``: whether an optimizer step was interrupted.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        runtime: Runtime,
        evaluator: Evaluator,
        algorithm: Algorithm,
        progress: TrainingProgress,
    ) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.runtime, self.evaluator, self.algorithm = runtime, evaluator, algorithm
        self.backbone = runtime.backbone
        self.optimizer = make_optimizer(
            self.backbone.policy_parameters.values(),
            config.optimizer,
            runtime.family.device,
            seed=derive_seed(config.seed, Stream.ROUNDING) & (2**63 - 1),
        )
        self.energy = EnergyMeter(runtime.family.device)
        self.step, self.evaluated = 0, -1
        self.spent, self._share_before = Cost(), 0.0
        # Cost of collecting for a step that is not taken yet: a run stopped there resumes after its sampling.
        self._collected = Cost()
        self.updating = False
        self.watch = Watch(config.monitor.action, run.path / "best")

    @property
    def share(self) -> float:
        """The completed share of the run: of its steps, or of a tighter limit."""
        return max(self.step / self.config.steps, self.spent.share(self.config.limits))

    @property
    def done(self) -> bool:
        """Whether steps or a limit are used up, or the monitor ended the run."""
        return self.share >= 1 or self.watch.ends_run

    def train(self) -> None:
        """Train to the end. Raises Interrupted, and UserError for errors of reward, gradient or disk."""
        every = self.config.checkpoint_every
        with MetricsLog(self.run.metrics) as log, closing(self._open_trackers()) as self.trackers:
            log.truncate(self.step, self.evaluated)
            self.watch.read(read_metrics(log.path))
            while True:
                if self._evaluation_due():
                    self._evaluate(log)
                    if self.config.evaluation.checkpoint:
                        self.save()
                if self.done:
                    break
                if every and self.step > 0 and self.step % every == 0:
                    self.save()
                self._optimize(log)
            reason = "monitor" if self.watch.ends_run else "steps" if self.step >= self.config.steps else "limit"
            log.append({"kind": "end", "step": self.step, "reason": reason, **self.spent.totals()})
        self.save()
        policy = self.run.policy(self.config)
        if (restored := self.watch.restore(policy)) is not None:
            step = self.watch.alarm["best_step"] if restored and self.watch.alarm else self.step
            self.progress.message(f"{policy} holds the weights of step {step}")

    def save(self) -> Path:
        """Write a checkpoint, and the policy."""
        stored, state = self.algorithm.state()
        tensors = {f"algorithm.{name}": tensor for name, tensor in stored.items()}
        for name, parameter in self.backbone.policy_parameters.items():
            tensors[f"policy.{name}"] = parameter
            for key, value in state_tensors(self.optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        if self.evaluator.base is not None:
            tensors["evaluation.base"] = self.evaluator.base
        values = {
            "evaluated": self.evaluated,
            "spent": asdict(self.spent),
            "collected": asdict(self._collected),
            "share_before": self._share_before,
            "algorithm": state,
        }
        path = save_checkpoint(self.run.checkpoints, self.step, tensors, values)
        with atomic_folder(self.run.policy(self.config)) as folder:
            self.backbone.save_policy(folder)
        return path

    def resume(self) -> None:
        """Continue from the newest checkpoint; without one, from the start.

        Raises:
            UserError: the checkpoint is damaged or of another configuration.
        """
        saved = checkpoints(self.run.checkpoints)
        if not saved:
            return
        tensors, values = read_checkpoint(saved[-1])
        try:
            self._restore(tensors, values)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {saved[-1]} does not belong to this configuration ({str(error).splitlines()[0]}); "
                "resume with the config.yaml of its run"
            ) from None

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.backbone.policy_parameters.items():
                parameter.copy_(tensors[f"policy.{name}"])
                load_state_tensors(self.optimizer, parameter, _below(f"optimizer.{name}.", tensors))
        self.algorithm.restore(_below("algorithm.", tensors), values["algorithm"])
        self.evaluator.base = tensors.get("evaluation.base")
        self.step, self.evaluated = values["step"], values["evaluated"]
        self.spent, self._share_before = Cost(**values["spent"]), values["share_before"]
        self._collected = Cost(**values["collected"])

    def _open_trackers(self) -> Trackers:
        resumed = self.step if self.evaluated >= 0 else None
        settings = self.config.model_dump(mode="json")
        return Trackers.open(self.config.logging.trackers, self.run.path, settings, self.progress.message, resumed)

    def _evaluation_due(self) -> bool:
        if self.evaluated >= self.step:
            return False
        if self.step == 0 or self.done:
            return True
        if points := self.config.evaluation.points:
            # After the step that passes a mark; the first point is before training, the last at the end.
            return int(self.share * (points - 1)) > int(self._share_before * (points - 1))
        every = self.config.evaluation.every
        return every > 0 and self.step % every == 0

    def _evaluate(self, log: MetricsLog) -> None:
        evaluation = self.evaluator.evaluate(self.runtime, is_base=self.step == 0)
        self.trackers.log_images(self.step, *self.evaluator.keep_samples(self.run.path, self.step, evaluation.images))
        record = {
            "kind": "evaluation",
            "step": self.step,
            **evaluation.scores.record(),
            "eval_kl": evaluation.kl,
            **self.spent.totals(),
            "seconds": evaluation.seconds,
        }
        log.append(record)
        self.trackers.log(record)
        self.evaluated = self.step
        self.progress.message(evaluation_line(record))
        if (reason := self.watch.observe(read_metrics(log.path), self.backbone.save_policy)) is not None:
            assert self.watch.alarm is not None
            log.append(self.watch.alarm)
            self.progress.message(f"over-optimization at step {self.step}: {reason}; see docs/monitor.md")

    def _optimize(self, log: MetricsLog) -> None:
        runtime = self.runtime
        self.energy.start()
        cost = meter_cost(runtime)
        self.algorithm.collect(self.step)
        self._collected += cost()
        cost = meter_cost(runtime)
        self.progress.phase("training")
        result, norm = runtime.retry(
            self._gradient,
            lambda: runtime.fall_back(self.step + 1, staged=self.algorithm.can_fall_back_to_staged),
        )
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite; the weights are untouched. "
                "Lower optimizer.lr, raise objective.alpha, or check the reward's backward pass"
            )
        self.updating = True
        self.optimizer.step()
        self.updating = False
        runtime.meter.end_step()
        self._share_before = self.share
        self.step += 1
        total, self._collected = self._collected + cost(), Cost()
        self.spent += total
        record = {
            **step_record(self.step, result),
            "grad_norm": norm,
            **asdict(total),
            "memory_bytes": runtime.memory()[1],
            "stages": runtime.meter.finish(),
        }
        if (joules := self.energy.stop()) is not None:
            record["joules"] = joules
        if runtime.fallbacks:
            record["budget_event"] = "; ".join(runtime.fallbacks)
            runtime.fallbacks.clear()
        log.append(record)
        self.trackers.log(record)
        self.progress.update(self.step, record["reward_mean"], record.get("kl_mean"), share=self.share)

    def _gradient(self) -> tuple[StepResult, float]:
        """The step's gradient, clipped, and its norm before; the update then allocates nothing more."""
        self.optimizer.zero_grad(set_to_none=True)
        result = self.algorithm.accumulate(self.step)
        self.runtime.enter("optimizer")
        norm = clip_grad_norm(self.optimizer, self.config.optimizer.max_grad_norm)
        allocate_states(self.optimizer)
        return result, norm


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
