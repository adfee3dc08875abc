"""A run from its beginning to its end: planned, held to its budget, stopped and continued."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch

from sqdf_fast.config import Config, with_settings
from sqdf_fast.display import TrainingProgress
from sqdf_fast.engine.gpu_memory import DeviceMemory, cap_process
from sqdf_fast.engine.oom_fallback import normalize_oom_errors
from sqdf_fast.engine.runtime import pick_device, pick_dtype
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors
from sqdf_fast.plan import Plan, make_plan, parse_memory
from sqdf_fast.plan.device import CONTEXT_BYTES, CPU, GIB
from sqdf_fast.runs import read_run, summary_lines, write_environment, write_report
from sqdf_fast.runs.checkpoint import checkpoints, step_of
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.training.trainer import Interrupted, Trainer


def plan_for(
    config: Config, vram: str, *, gpu: str | None = None, allow: Sequence[str] = (), keep: Sequence[str] = ()
) -> Plan:
    """The fastest plan for ``config`` inside ``vram``, such as "24G"; "80%" is of the GPU here.

    Args:
        gpu: whose speed the predicted time is for; None: the GPU here, or a common one of that memory.
        allow: quantizations that may be tried; keep: settings that stay as they are, dotted keys; see `make_plan`.

    Raises:
        UserError: a budget that is none, or a model or reward that cannot be simulated.
    """
    # What no plan is of is refused as for a run.
    with_settings(config, {"vram": vram})
    device = pick_device(config.device)
    total = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        total, gpu = properties.total_memory, gpu or properties.name
    return make_plan(config, parse_memory(vram, total), device_name=gpu, allow=allow, keep=keep)


def _planned(config: Config, keep: Sequence[str]) -> tuple[Config, Plan | None]:
    """The configuration as its memory budget asks for, and the plan; as it is without a budget."""
    budget = config.vram
    if budget is None:
        return config, None
    device = pick_device(config.device)
    # The plan is of the precision that will run here.
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    config = config.model_copy(update={"dtype": dtype})
    plan = plan_for(config, budget, gpu=None if device.type == "cuda" else CPU.name, keep=keep)
    if not plan.fits:
        raise UserError(f"--vram {budget}: {config.model} does not fit; {plan.advice}")
    return with_settings(config, plan.settings), plan


def _hold_to(plan: Plan | None, config: Config) -> None:
    """From now on this process takes no more of the GPU than the plan's budget."""
    if plan is not None:
        needed = plan.peak_gib + plan.reserve_gib
        cap_process(
            pick_device(config.device),
            int(plan.vram_gib * GIB),
            needed=int(needed * GIB),
            context_bytes=CONTEXT_BYTES,
        )


def _planned_bytes(plan: Plan | None, config: Config) -> int | None:
    # What a CPU's process has in memory is more than the tensors of the plan.
    return int(plan.peak_gib * GIB) if plan is not None and pick_device(config.device).type == "cuda" else None


def _stored_plan(run: RunFolder) -> Plan | None:
    try:
        return Plan.from_json(run.plan.read_text(encoding="utf-8")) if run.plan.exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.plan} is damaged ({error}); delete it to continue without a budget") from None


def new_run(
    config: Config,
    path: Path | None,
    interrupted: Callable[[], bool] = lambda: False,
    keep: Sequence[str] = (),
) -> str:
    """Train into a new run folder (default ``runs/MODEL-REWARD-NNN``) and return its summary.

    Everything that can be refused is refused before the folder is made.

    Raises:
        UserError: bad input; Interrupted: the user stopped it, a checkpoint is written.
    """
    if path is None:
        # A reward may be module:function or a weighted sum.
        reward = re.sub(r"[^\w.+-]+", "-", config.reward)
        name = f"{Path(config.model).resolve().name}-{reward}"
        path = RunFolder.next_free(Path("runs"), name)
    RunFolder.refuse_existing(path)
    config, plan = _planned(config, keep)
    _hold_to(plan, config)
    with TrainingProgress(config.steps, planned_bytes=_planned_bytes(plan, config)) as progress:
        _say_whose_memory(config, progress)
        with _room_to_start():
            trainer = Trainer(config, RunFolder(path), progress, interrupted)
            trainer.preflight()
        run = RunFolder.create(path, config)
        if plan is not None:
            with disk_errors(run.plan):
                run.plan.write_text(plan.as_json(), encoding="utf-8")
        return _finish(trainer)


def continue_run(path: Path, interrupted: Callable[[], bool] = lambda: False) -> str:
    """Train on from the newest checkpoint of a run folder and return its summary. Raises as :func:`new_run`."""
    run, config = RunFolder.open(path)
    found = checkpoints(run.checkpoints)
    plan = _stored_plan(run)
    _hold_to(plan, config)
    first = step_of(found[-1]) if found else 0
    with TrainingProgress(config.steps, first, planned_bytes=_planned_bytes(plan, config)) as progress:
        _say_whose_memory(config, progress)
        with _room_to_start():
            trainer = Trainer(config, run, progress, interrupted)
            trainer.resume()
        return _finish(trainer)


def _say_whose_memory(config: Config, progress: TrainingProgress) -> None:
    device = pick_device(config.device)
    if device.type == "cuda":
        progress.message(str(DeviceMemory.of(device)))


@contextmanager
def _room_to_start() -> Iterator[None]:
    try:
        with normalize_oom_errors():
            yield
    except torch.OutOfMemoryError:
        raise UserError(
            "out of memory before the first step; give --vram, which plans where the weights are, or see what others "
            "hold of the GPU with nvidia-smi"
        ) from None


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
        # The state is that of the last whole step: it is worth keeping, unless the disk itself is what failed.
        with suppress(UserError):
            trainer.save()
            write_report(folder)
        raise
    except torch.OutOfMemoryError:
        # In the middle of an update some parameters are of the next step already.
        if not trainer.whole:
            raise UserError(
                f"out of memory in the optimizer after step {trainer.step}, where nothing smaller can be tried; start "
                "anew with --vram, or with --set optimizer.kind=adamw8bit --set optimizer.states=cpu"
            ) from None
        trainer.save()
        write_report(folder)
        raise UserError(
            f"out of memory in the judges after step {trainer.step}; the state is saved: make room on the GPU and "
            f"continue with --resume {folder}"
        ) from None
    write_report(folder)
    return "\n".join(summary_lines(read_run(folder)))
