"""A training run from start to end: planned, capped to its memory budget, stopped and resumed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch

from sqdf_fast.algorithms import make_algorithm
from sqdf_fast.config import Config, with_settings
from sqdf_fast.display import TrainingProgress
from sqdf_fast.engine.gpu_memory import DeviceMemory, cap_process
from sqdf_fast.engine.loading import load_run_reward, pick_device, pick_dtype
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.files import write_text
from sqdf_fast.plan import Plan, make_plan, parse_memory
from sqdf_fast.plan.device import CONTEXT_BYTES, CPU, GIB
from sqdf_fast.prompts import load_prompts
from sqdf_fast.rewards import preflight
from sqdf_fast.runs import read_run, summary_lines, write_environment, write_report
from sqdf_fast.runs.checkpoint import checkpoints, step_of
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.runs.trackers import refuse_missing
from sqdf_fast.training.evaluator import Evaluator, HeldOut
from sqdf_fast.training.trainer import Trainer


def plan_for(
    config: Config, vram: str, *, gpu: str | None = None, allow: Sequence[str] = (), keep: Sequence[str] = ()
) -> Plan:
    """The fastest plan for ``config`` inside ``vram``, such as "24G"; "80%" is of the GPU here.

    Args:
        gpu: GPU of the predicted time; None: the GPU here, or a common one of that memory.
        allow: quantizations to try; keep: dotted keys of settings that the plan leaves as they are.

    Raises:
        UserError: an invalid budget, or a model or reward that cannot be simulated.
    """
    # Refuses what a run would refuse.
    with_settings(config, {"vram": vram})
    device = pick_device(config.device)
    total = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        total, gpu = properties.total_memory, gpu or properties.name
    return make_plan(config, parse_memory(vram, total), device_name=gpu, allow=allow, keep=keep)


def new_run(config: Config, path: Path | None, stop: threading.Event | None = None, keep: Sequence[str] = ()) -> str:
    """Train into a new run folder (default ``runs/MODEL-REWARD-NNN``) and return its summary.

    Everything that can be refused is refused before the folder is made.

    Args:
        stop: set to end the run after its current network call; keep: settings that a plan leaves as they are.

    Raises:
        UserError: bad input; Interrupted: the run was stopped, a checkpoint is written.
    """
    if path is None:
        # A reward may be module:function or a weighted sum.
        reward = re.sub(r"[^\w.+-]+", "-", config.reward)
        path = RunFolder.next_free(Path("runs"), f"{Path(config.model).resolve().name}-{reward}")
    RunFolder.refuse_existing(path)
    plan, budget = None, config.vram
    if budget is not None:
        device = pick_device(config.device)
        # Plan for the precision that will run here.
        config = config.model_copy(update={"dtype": str(pick_dtype(config.dtype, device)).removeprefix("torch.")})
        plan = plan_for(config, budget, gpu=None if device.type == "cuda" else CPU.name, keep=keep)
        if not plan.fits:
            raise UserError(f"--vram {budget}: {config.model} does not fit; {plan.advice}")
        config = with_settings(config, plan.settings)

    def begin(trainer: Trainer) -> None:
        check(trainer)
        run = RunFolder.create(path, config)
        if plan is not None:
            write_text(run.plan, plan.as_json())

    return _run(RunFolder(path), config, plan, stop, begin)


def continue_run(path: Path, stop: threading.Event | None = None) -> str:
    """Train on from the newest checkpoint of a run folder and return its summary. Raises as :func:`new_run`."""
    run, config = RunFolder.open(path)
    try:
        plan = Plan.from_json(run.plan.read_text(encoding="utf-8")) if run.plan.exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.plan} is damaged ({error}); delete it to continue without a budget") from None
    return _run(run, config, plan, stop, lambda trainer: trainer.resume())


def _run(
    run: RunFolder,
    config: Config,
    plan: Plan | None,
    stop: threading.Event | None,
    begin: Callable[[Trainer], None],
) -> str:
    """Train inside the plan's budget from where ``begin`` puts the trainer, and return the summary."""
    device, planned = pick_device(config.device), None
    if plan is not None:
        needed = plan.peak_gib + plan.reserve_gib
        cap_process(device, int(plan.vram_gib * GIB), needed=int(needed * GIB), context_bytes=CONTEXT_BYTES)
        # A CPU's process has more in memory than the tensors of the plan.
        planned = int(plan.peak_gib * GIB) if device.type == "cuda" else None
    saved = checkpoints(run.checkpoints)
    with TrainingProgress(config.steps, step_of(saved[-1]) if saved else 0, planned_bytes=planned) as progress:
        if device.type == "cuda":
            progress.message(str(DeviceMemory.of(device)))
        try:
            with normalize_oom_errors():
                trainer = _assemble(config, run, stop, progress)
                begin(trainer)
        except torch.OutOfMemoryError:
            raise UserError(
                "out of memory before the first step; give --vram to plan where the weights are, or see with "
                "nvidia-smi what other processes use"
            ) from None
        return _finish(trainer)


def check(trainer: Trainer) -> None:
    """Run the reward, its gradient and the judges on two of the base model's images. Raises UserError if one fails."""
    runtime, evaluator, algorithm = trainer.runtime, trainer.evaluator, trainer.algorithm
    # No more images at once than in a step.
    number = min(2, runtime.execution.decode_images)
    prompts = (algorithm.prompts * 2)[:number]
    seeds = sample_seeds(trainer.config.seed, Stream.PREFLIGHT, 0, number)
    images = runtime.decode(runtime.sample(prompts, seeds, "checking", role="reference").x0)
    runtime.begin("checking", "reward")
    images = images.to(runtime.family.device)
    preflight(evaluator.reward, images, prompts, needs_gradient=algorithm.needs_gradient)
    for prompt in dict.fromkeys(evaluator.held_out.prompts):
        evaluator.judges.alignment(images[:1], [prompt])


def _assemble(config: Config, run: RunFolder, stop: threading.Event | None, progress: TrainingProgress) -> Trainer:
    refuse_missing(config.logging.trackers)
    prompts, held_out = load_prompts(config.prompts), HeldOut.of(config)
    known = list(dict.fromkeys([*prompts, *held_out.prompts]))
    # The reward first: a wrong one is refused before gigabytes of model are loaded.
    reward = load_run_reward(config, known)
    runtime = Runtime.load(config, prompts=known, reward=reward, stop=stop, progress=progress)
    progress.memory = runtime.memory
    evaluator = Evaluator(config, reward, held_out, prompts=known)
    return Trainer(config, run, runtime, evaluator, make_algorithm(config, runtime, prompts), progress)


def _finish(trainer: Trainer) -> str:
    folder = trainer.run.path
    write_environment(folder)
    try:
        with closing(trainer.energy), normalize_oom_errors():
            trainer.train()
    except Interrupted:
        trainer.save()
        write_report(folder)
        raise Interrupted(folder) from None
    except UserError:
        # The state is that of the last complete step: keep it, unless the disk itself failed.
        with suppress(UserError):
            trainer.save()
            write_report(folder)
        raise
    except torch.OutOfMemoryError:
        # In the middle of an update some parameters are of the next step already.
        if trainer.updating:
            raise UserError(
                f"out of memory in the optimizer after step {trainer.step}, which has no smaller settings; start "
                "a new run with --vram, or with --set optimizer.kind=adamw8bit --set optimizer.states=cpu"
            ) from None
        trainer.save()
        write_report(folder)
        raise UserError(
            f"out of memory in the judges after step {trainer.step}; the state is saved: make room on the GPU and "
            f"continue with --resume {folder}"
        ) from None
    write_report(folder)
    return "\n".join(summary_lines(read_run(folder)))
