"""The monitor of a run: its alarm, what follows from it, and the weights that it may restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from sqdf_fast.monitor import Record, new_alarm
from sqdf_fast.training.best_weights import BestWeights


class Watch:
    """Looks at every evaluation for over-optimization.

    Args:
        action: ``monitor.action``; folder: of the weights that "restore" keeps.

    Attributes:
        alarm: the alarm's record; None while there was none.
    """

    def __init__(self, action: Literal["off", "warn", "stop", "restore"], folder: Path) -> None:
        self.action = action
        self.alarm: Record | None = None
        self._best = BestWeights(folder)

    @property
    def ends_run(self) -> bool:
        """Whether an alarm has ended the run."""
        return self.alarm is not None and self.action in ("stop", "restore")

    def read(self, records: Sequence[Record]) -> None:
        """Take the alarm of a run that is resumed from its metrics."""
        self.alarm = next((record for record in records if record.get("kind") == "alarm"), None)

    def observe(self, records: Sequence[Record], save: Callable[[Path], None]) -> str | None:
        """Look at a run's metrics after an evaluation; the reason of a new alarm, whose record is ``alarm`` then.

        Args:
            save: writes the weights as they are now to a folder.
        """
        if self.action == "off":
            return None
        evaluations = [record for record in records if record.get("kind") == "evaluation"]
        if self.action == "restore":
            self._best.keep(evaluations, save)
        alarm = new_alarm(evaluations)
        if alarm is None:
            return None
        self.alarm = alarm.record()
        return alarm.reason

    def restore(self, policy: Path) -> bool | None:
        """Put the best weights in the place of the folder ``policy``: whether they were kept; None without need."""
        if self.alarm is None or self.action != "restore":
            return None
        return self._best.restore(self.alarm["best_step"], policy)
