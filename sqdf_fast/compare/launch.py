"""Concurrent runs as jobs of submitit: local processes, or jobs of a Slurm cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import submitit

from sqdf_fast.compare.devices import device_slots
from sqdf_fast.compare.jobs import Job, Tail
from sqdf_fast.compare.progress import CompareProgress
from sqdf_fast.compare.worker import RunProcess, failure, on_stop_request
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.files import disk_errors

LAUNCHERS = ("local", "slurm", "debug")
POLL = 0.2
# Seconds: a run reacts between two network calls and then writes a checkpoint.
GRACE = 60.0
_YEAR = 365 * 24 * 60
_DAY = 24 * 60
# Restarts of a Slurm job that ran out of time.
_REQUEUES = 100

Handle = submitit.Job[int]


class LocalLauncher:
    """Local processes that end with the process that started them.

    Args:
        folder: submitit's files.
        jobs: number of concurrent runs; None: one per GPU, one on the CPU.
        device: setting `device` of the runs.
    """

    def __init__(self, folder: Path, jobs: int | None, device: str) -> None:
        self._folder, self._slots = folder, device_slots(jobs, device)

    def capacity(self, waiting: int) -> int:
        """The number of runs to start at a time."""
        return len(self._slots)

    def start(self, job: Job, slot: int) -> Handle:
        """Start a run in one of the slots, numbers below the capacity."""
        executor = submitit.LocalExecutor(self._folder, python=self._python(slot))
        executor.update_parameters(timeout_min=_YEAR)
        with _without_ctrl_c():
            return executor.submit(RunProcess(job, os.getcwd(), parent=os.getpid()))

    def _python(self, slot: int) -> str:
        """Python with the slot's devices; submitit itself would hide all GPUs, or show only numbered ones."""
        devices = self._slots[slot]
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES") if devices.gpu is None else devices.gpu
        environment = ["-u", "CUDA_VISIBLE_DEVICES"] if gpu is None else [f"CUDA_VISIBLE_DEVICES={gpu}"]
        if devices.threads is not None:
            environment.append(f"OMP_NUM_THREADS={devices.threads}")
        return _python(*environment)

    def ask_to_stop(self, handle: Handle) -> None:
        """Make a run save its state and end."""
        # submitit's own `cancel` leaves a run one second.
        if not handle.done():
            os.kill(int(handle.job_id), signal.SIGTERM)

    def kill(self, handle: Handle) -> None:
        """End a run and its processes at once."""
        if handle.done():
            return
        with suppress(psutil.NoSuchProcess):
            controller = psutil.Process(int(handle.job_id))
            family = [controller, *controller.children(recursive=True)]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=GRACE)


class ClusterLauncher:
    """Cluster jobs, which outlive the process that submitted them, by a submitit executor.

    Args:
        jobs: number of queued jobs at a time; None: all.
    """

    def __init__(self, executor: submitit.Executor, jobs: int | None) -> None:
        self._executor, self._jobs = executor, jobs

    def capacity(self, waiting: int) -> int:
        return self._jobs or waiting

    def start(self, job: Job, slot: int) -> Handle:
        return self._executor.submit(RunProcess(job, os.getcwd()))

    def ask_to_stop(self, handle: Handle) -> None:
        if not handle.done():
            handle.cancel(check=False)

    kill = ask_to_stop


Launcher = LocalLauncher | ClusterLauncher


@contextmanager
def open_launcher(
    kind: str, folder: Path, jobs: int | None, device: str, slurm: Mapping[str, Any]
) -> Iterator[Launcher]:
    """The launcher of a comparison.

    Args:
        kind: "local"; "slurm"; "debug": in this process, one run after the other.
        folder: folder of the comparison.
        jobs: number of concurrent runs; None: one per GPU, one on the CPU, all on a cluster.
        device: setting `device` of the runs.
        slurm: parameters of `sbatch` by submitit's names.

    Raises:
        UserError: Slurm is not installed here, or does not know a parameter.
    """
    if slurm and kind != "slurm":
        raise UserError(f"--slurm {next(iter(slurm))}=... has no effect without --launcher slurm; leave it out")
    files = folder / ".submitit"
    if kind == "slurm":
        yield ClusterLauncher(_slurm(files, slurm), jobs)
        # Kept after an interruption: queued jobs read their files when they start.
        shutil.rmtree(files, ignore_errors=True)
        return
    # Files of a killed comparison may have the names of new ones, because process ids are reused.
    shutil.rmtree(files, ignore_errors=True)
    with disk_errors(files):
        files.mkdir(parents=True)
    try:
        debug = submitit.AutoExecutor(files, cluster="debug")
        yield LocalLauncher(files, jobs, device) if kind == "local" else ClusterLauncher(debug, jobs=1)
    finally:
        shutil.rmtree(files, ignore_errors=True)


def _slurm(folder: Path, settings: Mapping[str, Any]) -> submitit.SlurmExecutor:
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUES, python=_python())
    except RuntimeError:
        raise UserError("--launcher slurm: `srun` is not installed here; run it on a host that submits jobs") from None
    try:
        executor.update_parameters(**{"job_name": "sqdf-fast", "time": _DAY, "gpus_per_node": 1, **settings})
    except ValueError as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
    return executor


def _python(*environment: str) -> str:
    """A command line for this Python in a changed environment, without the working directory on its path."""
    return shlex.join(["env", *environment, "PYTHONSAFEPATH=1", sys.executable])


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Shield processes started inside from the terminal's Ctrl-C: this process gets it and asks its runs to stop."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class Active(NamedTuple):
    """A run in progress."""

    job: Job
    slot: int
    handle: Handle
    tail: Tail


def run_jobs(jobs: Sequence[Job], launcher: Launcher, progress: CompareProgress) -> dict[str, str]:
    """Run the jobs that are not finished, as many at a time as the launcher takes; a failure does not end the others.

    Returns:
        name and one-line reason of each job that failed.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; every run in progress has saved its state and ended.
    """
    waiting = deque(job for job in jobs if not job.ended)
    free = deque(range(launcher.capacity(len(waiting))))
    active: dict[int, Active] = {}
    failed: dict[str, str] = {}
    requests: list[int] = []
    with on_stop_request(requests.append):
        try:
            while (waiting or active) and not requests:
                while waiting and free and not requests:
                    job, slot = waiting.popleft(), free.popleft()
                    # The log of an earlier attempt does not explain this one.
                    job.log.unlink(missing_ok=True)
                    tail = Tail(job.folder / "metrics.jsonl")
                    active[slot] = Active(job, slot, launcher.start(job, slot), tail)
                    progress.began(job, tail)
                ended = [run for run in active.values() if run.handle.done()]
                for run in active.values():
                    run.tail.read()
                # A run that was asked to stop has not failed.
                for run in ended if not requests else ():
                    free.append(active.pop(run.slot).slot)
                    if (reason := _failure(run)) is not None:
                        failed[run.job.name] = reason
                    progress.finished(run.job, reason)
                progress.tick()
                if active:
                    time.sleep(POLL)
            if requests:
                progress.message("Stopping: the running jobs save their state; press again to stop at once.")
                for run in active.values():
                    launcher.ask_to_stop(run.handle)
                deadline = time.monotonic() + GRACE
                while time.monotonic() < deadline and len(requests) < 2:
                    if all(run.handle.done() for run in active.values()):
                        break
                    time.sleep(POLL)
                raise Interrupted
        finally:
            for run in active.values():
                launcher.kill(run.handle)
    return failed


def _failure(run: Active) -> str | None:
    if run.job.ended:
        return None
    if (reason := failure(run.job.log)) is not None:
        return reason
    # A failure before the run's log exists is in submitit's own log.
    lines = (run.handle.stderr() or "").rstrip().splitlines()
    if lines and not run.job.log.exists():
        return lines[-1]
    return f"its process was killed, perhaps for lack of memory; see {run.job.log}"
