"""The training loop: collect, step, evaluate, save."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.algorithms import make_algorithm
from sqdf_fast.config import Config, Limits
from sqdf_fast.display import TrainingProgress
from sqdf_fast.engine import Parts, StepResult
from sqdf_fast.engine.meters import EnergyMeter, StageMeter
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.engine.optimizers import (
    allocate_states,
    clip_grad_norm,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)
from sqdf_fast.engine.rollouts import Rollouts
from sqdf_fast.engine.runtime import (
    HeldOut,
    encode_all,
    load_backbone,
    loading_device,
    make_sampler,
    pick_device,
    pick_dtype,
)
from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import evaluate_images, load_judges
from sqdf_fast.files import atomic_folder
from sqdf_fast.kernels.philox import derive_seed
from sqdf_fast.monitor import new_alarm
from sqdf_fast.prompts import load_prompts
from sqdf_fast.rewards import checked_reward, load_reward, preflight
from sqdf_fast.runs import MetricsLog, read_metrics, save_samples
from sqdf_fast.runs.checkpoint import checkpoints, read_checkpoint, save_checkpoint
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.training.best_weights import BestWeights


class Interrupted(Exception):
    """The user asked to stop; the trainer's state is that of its last whole step."""


@dataclass(frozen=True)
class Spent:
    """What training has cost, evaluations apart.

    Attributes:
        unet_evaluations: rows that went through the network; seconds: of sampling and steps.
        reward_evaluations: pictures that the reward scored.
    """

    unet_evaluations: int = 0
    seconds: float = 0.0
    reward_evaluations: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.unet_evaluations + other.unet_evaluations,
            self.seconds + other.seconds,
            self.reward_evaluations + other.reward_evaluations,
        )

    def share(self, limits: Limits) -> float:
        """How much of the tightest limit is spent; 0 where there is none."""
        shares = [0.0]
        if limits.unet_evaluations is not None:
            shares.append(self.unet_evaluations / limits.unet_evaluations)
        if limits.seconds is not None:
            shares.append(self.seconds / limits.seconds)
        return max(shares)


class Trainer:
    """One run, from a configuration to a LoRA.

    State that decides what follows is (step, evaluated, spent), policy, optimizer and the algorithm's own; every
    random number derives from the run's seed and these counters, so a resumed run equals the uninterrupted one
    bit for bit (on one machine and version, on the CPU).

    Args:
        config: validated; run: the folder it owns; progress: told what happens.
        interrupted: asked between network calls; True ends the run with :class:`Interrupted`.

    Raises:
        UserError: anything of the configuration that cannot be had or does not fit; the reward's preflight.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        progress: TrainingProgress,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.run, self.progress, self._interrupted = config, run, progress, interrupted
        self.prompts = load_prompts(config.prompts)
        self.held_out = HeldOut.of(config)
        # A wrong reward shows before gigabytes of model are loaded.
        device = pick_device(config.device)
        home = loading_device(config, device)
        self.reward = load_reward(
            config.reward, device=home, dtype=pick_dtype(config.dtype, device), **config.reward_options
        )
        known_prompts = list(dict.fromkeys([*self.prompts, *self.held_out.prompts]))
        self.reward.encode_prompts(known_prompts)
        self.reward.drop_text_tower()
        self.backbone = load_backbone(config)
        encode_all(self.backbone.family, ["", *known_prompts])
        self.backbone.family.release_text_encoders()
        evaluation = config.evaluation
        self.judges = load_judges(
            config.model,
            self.reward,
            evaluation.judges,
            evaluation.held_out,
            evaluation.judge_options,
            pick_dtype(config.dtype, device),
        )
        self.judges.encode_prompts(known_prompts)
        self.meter, self.energy = StageMeter(device), EnergyMeter(device)
        progress.memory = self._memory
        self._given_up: list[str] = []
        self.rollouts = Rollouts(
            config,
            self.prompts,
            self.backbone,
            make_sampler(config, self.backbone),
            self._score,
            Parts(self.backbone, self.reward),
            on_stage=self.meter,
            on_progress=self._report,
            on_smaller=self._give_up,
        )
        self.algorithm = make_algorithm(config, self.rollouts)
        self.optimizer = make_optimizer(
            self.backbone.policy_parameters.values(),
            config.optimizer,
            self.backbone.family.device,
            seed=derive_seed(config.seed, Stream.ROUNDING) & (2**63 - 1),
        )
        self.step, self.evaluated = 0, -1
        self.spent, self._share_before = Spent(), 0.0
        # For a step that is not over: a run that is stopped there goes on behind its sampling.
        self._collected = Spent()
        self._updating = False
        self._best = BestWeights(run.path / "best")
        self._alarm: dict[str, Any] | None = None
        # Of the base model's pictures: the first evaluation's.
        self._base: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the state is that of a whole step: no update was broken off."""
        return not self._updating

    @property
    def share(self) -> float:
        """How much of the run is over: of its steps, or of a limit that is reached before them."""
        return max(self.step / self.config.steps, self.spent.share(self.config.limits))

    @property
    def done(self) -> bool:
        """Whether steps or a limit are used up, or the monitor ended the run."""
        return self.share >= 1 or self._alarmed

    def preflight(self) -> None:
        """Check the reward's value and gradient, and the judges, on two pictures of the base model."""
        # No more pictures at once than a step will score.
        number = min(2, self.rollouts.execution.decode_images)
        family, prompts = self.backbone.family, (self.prompts * 2)[:number]
        seeds = sample_seeds(self.config.seed, Stream.PREFLIGHT, 0, number)
        sampled = self.rollouts.sample(prompts, seeds, "checking", role="reference")
        images = self.rollouts.decode(sampled.x0).to(family.device)
        preflight(self.reward, images, prompts, needs_gradient=self.algorithm.needs_gradient)
        # Prompts that a judge cannot read are refused now, not at the first evaluation.
        for prompt in dict.fromkeys(self.held_out.prompts):
            self.judges.alignment(images[:1], [prompt])

    def train(self) -> None:
        """Train to the end. Raises Interrupted, and UserError when reward, gradient or disk fail."""
        every = self.config.checkpoint_every
        with MetricsLog(self.run.metrics) as log:
            log.truncate(self.step, self.evaluated)
            self._alarm = next((line for line in read_metrics(log.path) if line.get("kind") == "alarm"), None)
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
            reason = "monitor" if self._alarmed else "steps" if self.step >= self.config.steps else "limit"
            log.append({"kind": "end", "step": self.step, "reason": reason, **_totals(self.spent)})
        self.save()
        if self._alarm is not None and self.config.monitor.action == "restore":
            step, policy = self._alarm["best_step"], self.run.policy(self.config)
            found = self._best.restore(step, policy)
            self.progress.message(f"{policy} holds the weights of step {step if found else self.step}")

    def save(self) -> Path:
        """Write a checkpoint of the state as it is now, and its LoRA."""
        found, state = self.algorithm.state()
        tensors = {f"algorithm.{name}": tensor for name, tensor in found.items()}
        for name, parameter in self.backbone.policy_parameters.items():
            tensors[f"policy.{name}"] = parameter
            for key, value in state_tensors(self.optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        if self._base is not None:
            tensors["evaluation.base"] = self._base
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
        found = checkpoints(self.run.checkpoints)
        if not found:
            return
        tensors, values = read_checkpoint(found[-1])
        try:
            self._restore(tensors, values)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {found[-1]} does not belong to this configuration ({str(error).splitlines()[0]}); "
                "resume with the config.yaml of its run"
            ) from None

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.backbone.policy_parameters.items():
                parameter.copy_(tensors[f"policy.{name}"])
                prefix = f"optimizer.{name}."
                state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
                load_state_tensors(self.optimizer, parameter, state)
        prefix = "algorithm."
        stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        self.algorithm.restore(stored, values["algorithm"])
        self._base = tensors.get("evaluation.base")
        self.step, self.evaluated = values["step"], values["evaluated"]
        self.spent, self._share_before = Spent(**values["spent"]), values["share_before"]
        self._collected = Spent(**values["collected"])

    def _evaluation_due(self) -> bool:
        if self.evaluated >= self.step:
            return False
        if self.step == 0 or self.done:
            return True
        if points := self.config.evaluation.points:
            # The step that passed a mark: the first point is before training, the last at the end.
            return int(self.share * (points - 1)) > int(self._share_before * (points - 1))
        every = self.config.evaluation.every
        return every > 0 and self.step % every == 0

    def _evaluate(self, log: MetricsLog) -> None:
        started = time.monotonic()
        prompts, seeds = self.held_out.prompts, self.held_out.seeds
        sampled = self.rollouts.sample(prompts, seeds, "evaluating", keep="trainable")
        assert sampled.states is not None
        divergence = self.rollouts.divergence(sampled.states, prompts)
        images = self.rollouts.decode(sampled.x0)
        there = images.to(self.backbone.family.device)
        if self.step == 0:
            self._base = self.judges.embed(there)
        by_prompt: dict[str, list[float]] = {}
        scores = evaluate_images(there, prompts, self.reward, self.judges, base=self._base, by_prompt=by_prompt)
        # Its stages are no part of a step; the run's peak knows them.
        self.meter.drop_step()
        self._keep_samples(images)
        record = {
            "kind": "evaluation",
            "step": self.step,
            **scores,
            "eval_kl": float(divergence.mean()),
            **_totals(self.spent),
            "diversity_measure": self.judges.diversity_measure,
            "better": self.judges.better,
            "by_prompt": by_prompt,
            "seconds": time.monotonic() - started,
        }
        log.append(record)
        self.evaluated = self.step
        self.progress.message(_evaluation_line(record))
        if self.config.monitor.action != "off":
            self._watch(log)

    @property
    def _alarmed(self) -> bool:
        return self._alarm is not None and self.config.monitor.action in ("stop", "restore")

    def _watch(self, log: MetricsLog) -> None:
        evaluations = [line for line in read_metrics(log.path) if line.get("kind") == "evaluation"]
        if self.config.monitor.action == "restore":
            self._best.keep(evaluations, self.backbone.save_policy)
        if (alarm := new_alarm(evaluations)) is not None:
            self._alarm = alarm.record()
            log.append(self._alarm)
            self.progress.message(f"over-optimisation at step {self.step}: {alarm.reason}; see docs/monitor.md")

    def _keep_samples(self, images: Tensor) -> None:
        # One image of each prompt first, then the second of each, ...: a grid shows as many prompts as it can.
        each = self.config.evaluation.images_per_prompt
        order = sorted(range(len(images)), key=lambda i: (i % each, i))[: self.config.evaluation.grid]
        save_samples(
            self.run.path,
            self.step,
            images[order],
            [self.held_out.prompts[i] for i in order],
            self.held_out.seeds[order].tolist(),
        )

    def _optimize(self, log: MetricsLog) -> None:
        self.energy.start()
        cost = self._meter_cost()
        self.algorithm.collect(self.step)
        self._collected += cost()
        cost = self._meter_cost()
        self.progress.phase("training")
        result, norm = self._gradient()
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite; the weights are untouched. "
                "Lower optimizer.lr, raise objective.alpha, or check the reward's backward pass"
            )
        self._updating = True
        self.optimizer.step()
        self._updating = False
        self.meter.end_step()
        self._share_before = self.share
        self.step += 1
        whole, self._collected = self._collected + cost(), Spent()
        self.spent += whole
        record = {
            **self._record(result),
            "grad_norm": norm,
            **asdict(whole),
            "memory_bytes": self._memory()[1],
            "stages": self.meter.finish(),
        }
        if (joules := self.energy.stop()) is not None:
            record["joules"] = joules
        if self._given_up:
            record["budget_event"] = "; ".join(self._given_up)
            self._given_up.clear()
        log.append(record)
        self.progress.update(self.step, record["reward_mean"], record.get("kl_mean"), share=self.share)

    def _memory(self) -> tuple[int | None, int]:
        """Bytes alive now, and the most so far."""
        return self.meter.live_bytes, self.meter.peak_bytes or _resident_memory()

    def _meter_cost(self) -> Callable[[], Spent]:
        """What is spent from now on to the call of the result."""
        started, evaluations, scored = time.monotonic(), self.backbone.evaluations, self.rollouts.reward_evaluations

        def spent() -> Spent:
            return Spent(
                self.backbone.evaluations - evaluations,
                time.monotonic() - started,
                self.rollouts.reward_evaluations - scored,
            )

        return spent

    def _gradient(self) -> tuple[StepResult, float]:
        """The step's gradient, clipped, and its norm; after it the update itself needs no more memory.

        Out of memory, the whole batch again with a smaller execution: nothing counts twice.
        """
        evaluations, scored = self.backbone.evaluations, self.rollouts.reward_evaluations
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            self.backbone.evaluations, self.rollouts.reward_evaluations = evaluations, scored
            try:
                with normalize_oom_errors():
                    result = self.algorithm.accumulate(self.step)
                    self.rollouts.enter("optimizer")
                    norm = clip_grad_norm(self.optimizer, self.config.optimizer.max_grad_norm)
                    allocate_states(self.optimizer)
                    return result, norm
            except torch.OutOfMemoryError:
                pass
            self.rollouts.smaller(self.rollouts.stage, self.step + 1, staged=self.algorithm.can_fall_back_to_staged)

    def _give_up(self, what: str) -> None:
        self.meter.drop_step()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._given_up.append(what)
        self.progress.message(what)

    def _record(self, result: StepResult) -> dict[str, Any]:
        reward, kl, index = result.reward.double(), result.kl, result.index
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.step,
            "reward_mean": reward.mean().item(),
            "reward_std": reward.std(correction=0).item(),
            "loss": float(result.loss),
        }
        if kl is not None:
            kl = kl.double().cpu()
            record["kl_mean"] = kl.mean().item()
            record["kl_by_index"] = {str(i): kl[index == i].mean().item() for i in index.unique().tolist()}
        return record

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self._interrupted():
            raise Interrupted
        return checked_reward(self.reward, images, prompts)

    def _report(self, phase: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if self._interrupted():
                raise Interrupted
            self.progress.phase(phase, done, total)

        return report


def _totals(spent: Spent) -> dict[str, float]:
    return {f"spent_{name}": value for name, value in asdict(spent).items()}


def _evaluation_line(record: dict[str, Any]) -> str:
    names = ("proxy_reward", "true_reward", "attribute_accuracy", "diversity", "alignment")
    scores = [(name, record.get(f"eval_{name}")) for name in names]
    shown = [f"{name.replace('_', ' ')} {score:.3f}" for name, score in scores if score is not None]
    return f"evaluation at step {record['step']}: " + ", ".join(shown)


def _resident_memory() -> int:
    """The most that this process has had in memory, in bytes: the machine's, where there is no GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
