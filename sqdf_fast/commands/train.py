"""A training run that stops when it is asked to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqdf_fast.config import Config
from sqdf_fast.training.lifecycle import continue_run, new_run

Say = Callable[[str], None]


def start_training(config: Config, keep: Sequence[str], output: Path | None, say: Say) -> str:
    """Train a new run in ``output`` and return its summary; ``keep``, ``output`` and what raises: see `new_run`."""
    with _interruption(say) as stop:
        return new_run(config, output, stop, keep)


def continue_training(path: Path, say: Say) -> str:
    """Continue the run in ``path`` and return its summary; what raises: see `continue_run`."""
    with _interruption(say) as stop:
        return continue_run(path, stop)


@contextmanager
def _interruption(say: Say) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the run to stop after its current network call, the second one kills it."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("Stopping after the current network call; press Ctrl-C again to stop now.")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
