"""The monitor of a run: its alarm, and the weights of an earlier evaluation that it may restore."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from sqdf_fast.files import atomic_folder
from sqdf_fast.monitor import Record, is_good, new_alarm
from sqdf_fast.runs.checkpoint import checkpoints


class Watch:
    """Checks every evaluation for over-optimization; ``alarm`` is the alarm's record, or None.

    Args:
        action: ``monitor.action``; folder: of the weights that "restore" keeps.
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
        """The reason of a new alarm after an evaluation, or None; ``save`` writes the current weights to a folder."""
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
        """Replace the folder ``policy`` by the best weights: whether they were kept; None without need."""
        if self.alarm is None or self.action != "restore":
            return None
        return self._best.restore(self.alarm["best_step"], policy)


class BestWeights:
    """``folder/step_{step}``, of the last evaluation with no judge below its best. Raises UserError on disk errors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, evaluations: Sequence[Record], save: Callable[[Path], None]) -> None:
        """Replace older weights by those of the last of ``evaluations``, written by ``save``, if it is good."""
        if not is_good(evaluations):
            return
        path = self._of(int(evaluations[-1]["step"]))
        with atomic_folder(path) as folder:
            save(folder)
        for old in checkpoints(self.folder):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def restore(self, step: int, policy: Path) -> bool:
        """Replace the folder ``policy`` by the weights of ``step``; False where they are not kept."""
        if not self._of(step).is_dir():
            return False
        with atomic_folder(policy) as folder:
            shutil.copytree(self._of(step), folder, dirs_exist_ok=True)
        return True

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"
