"""A stop flag that a test's own condition sets."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StopWhen(threading.Event):
    """Set as soon as ``asked()`` is true; it is asked wherever a run looks."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        super().__init__()
        self._asked = asked

    def is_set(self) -> bool:
        return self._asked()


def stop_after(looks: int) -> StopWhen:
    """Set once a run has looked so many times."""
    looked = iter(range(10**9))
    return StopWhen(lambda: next(looked) >= looks)
