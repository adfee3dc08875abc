"""The process of one run."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from submitit.helpers import Checkpointable

from sqdf_fast.compare.jobs import Job, make_ready
from sqdf_fast.errors import Interrupted, UserError

FAILED, REFUSED, STOPPED = 1, 2, 130
# Beginning of the last line of a failed run's log.
FAILURE = "failed: "


@dataclass(frozen=True)
class RunProcess(Checkpointable):
    """Starts or continues the run of a job like `sqdf-fast train`, with its output in a log; returns the exit status.

    SIGTERM and Ctrl-C save a checkpoint first. A Slurm job that runs out of time is requeued, and the run continues
    from its last evaluation.

    Attributes:
        directory: working directory, which relative paths and the user's own rewards refer to.
        parent: id of the process that this one must not outlive, if any.
    """

    job: Job
    directory: str
    parent: int | None = None

    def __call__(self) -> int:
        if self.parent is not None:
            threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()
        os.chdir(self.directory)
        self.job.log.parent.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        with on_stop_request(lambda number: stop.set()), _output_to(self.job.log):
            status = _guarded(self.job, stop)
        if self.parent is not None:
            # Library threads must not keep the process of a finished run alive.
            os._exit(status)
        if status == STOPPED:
            # For the previous signal handler.
            signal.raise_signal(signal.SIGTERM)
        return status


@contextmanager
def on_stop_request(ask: Callable[[int], None]) -> Iterator[None]:
    """Call ``ask`` with the number of the signal at each Ctrl-C or SIGTERM."""
    previous: dict[int, Any] = {}
    # Only possible in the main thread; elsewhere the caller has its own way to stop.
    with suppress(ValueError):
        for kind in (signal.SIGINT, signal.SIGTERM):
            previous[kind] = signal.signal(kind, lambda number, frame: ask(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def failure(log: Path) -> str | None:
    """The one-line reason why the run of this log failed; None without one."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return None
    return lines[-1].removeprefix(FAILURE) if lines and lines[-1].startswith(FAILURE) else None


def _guarded(job: Job, stop: threading.Event) -> int:
    # Only the errors matter to users.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with job.folder.with_name(f".{job.folder.name}.lock").open("w") as lock:
            # The process of a killed comparison may not have ended yet.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not job.ended:
                _run(job, stop)
    except Interrupted:
        return STOPPED
    except UserError as error:
        _say(str(error))
        return REFUSED
    except SystemExit:
        # submitit has requeued the job.
        raise
    except BaseException as error:
        traceback.print_exc()
        _say(f"{type(error).__name__}: {error}")
        return FAILED
    return 0


def _run(job: Job, stop: threading.Event) -> None:
    from sqdf_fast.compare.training_free import sample_training_free
    from sqdf_fast.training.lifecycle import continue_run, new_run

    if job.training_free is not None:
        sample_training_free(job, job.training_free, stop)
    elif make_ready(job):
        continue_run(job.folder, stop)
    else:
        new_run(job.config, job.folder, stop)


def _say(reason: str) -> None:
    """Make the reason of the failure the last line of the log, after what the user's own reward printed."""
    sys.stdout.flush()
    sys.stderr.write(f"{FAILURE}{' '.join(reason.split())}\n")


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirect the output of Python and of native libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("w", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            file.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def _end_with(parent: int) -> None:
    """End this process as soon as its ancestor ``parent`` is gone."""
    ancestor = next((process for process in psutil.Process().parents() if process.pid == parent), None)
    with suppress(psutil.NoSuchProcess):
        while ancestor is not None and ancestor.is_running() and ancestor.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    os._exit(STOPPED)
