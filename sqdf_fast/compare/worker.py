"""What a process of its own does for one run."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqdf_fast.compare.jobs import Job, make_ready
from sqdf_fast.errors import UserError

FAILED, REFUSED, STOPPED = 1, 2, 130
# How a log's last line begins when the run failed.
FAILURE = "failed: "


@dataclass(frozen=True)
class Place:
    """Where a run may compute.

    Attributes:
        gpu: what CUDA_VISIBLE_DEVICES is set to; None: as it is.
        threads: of the CPU; None: as the environment says.
    """

    gpu: str | None = None
    threads: int | None = None


def work(job: Job, place: Place, directory: str) -> None:
    """Train the run of ``job``, or go on with it, then leave the process. What it says goes to the job's log.

    Args:
        directory: the working directory, which relative paths and a reward of the user's own are looked for in.

    SIGTERM saves a checkpoint and ends it. It ends at once when the process that started it is gone.
    """
    # Ctrl-C is for the one process that the user sees; it asks its runs to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    os.chdir(directory)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        status = _guarded(job, place, asked)
        sys.stdout.flush()
        sys.stderr.flush()
    # Libraries' threads must not keep a finished run's process.
    os._exit(status)


def _guarded(job: Job, place: Place, asked: threading.Event) -> int:
    from sqdf_fast.errors import Interrupted

    try:
        with job.folder.with_name(f".{job.folder.name}.lock").open("w") as lock:
            # A process of an earlier, killed comparison may still be about to end.
            fcntl.flock(lock, fcntl.LOCK_EX)
            _run(job, place, asked)
    except Interrupted:
        return STOPPED
    except UserError as error:
        _say(str(error))
        return REFUSED
    except BaseException as error:
        traceback.print_exc()
        _say(f"{type(error).__name__}: {error}")
        return FAILED
    return 0


def _run(job: Job, place: Place, asked: threading.Event) -> None:
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    import torch

    from sqdf_fast.compare.training_free import sample_free
    from sqdf_fast.training.lifecycle import continue_run, new_run

    if place.threads is not None:
        torch.set_num_threads(place.threads)
    if job.free is not None:
        sample_free(job, job.free, asked)
    elif make_ready(job):
        continue_run(job.folder, asked)
    else:
        new_run(job.config, job.folder, asked)


def _say(reason: str) -> None:
    # What a reward of the user's own printed comes before it: the log's last line tells why a run failed.
    sys.stdout.flush()
    sys.stderr.write(f"{FAILURE}{' '.join(reason.split())}\n")


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(STOPPED)


def failure(log: Path) -> str | None:
    """Why the run of this log failed, in one line; None where it did not, or could not say so."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return None
    return lines[-1].removeprefix(FAILURE) if lines and lines[-1].startswith(FAILURE) else None


def context() -> Any:
    """Processes that begin with the trainer loaded: a run starts in a moment, and its memory is its own."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([f"sqdf_fast.{name}" for name in ("compare.quiet", "compare.worker", "train")])
    return found
