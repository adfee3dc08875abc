"""Weights of an earlier evaluation, kept as long as an alarm of the monitor may go back to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sqdf_fast.files import atomic_folder
from sqdf_fast.monitor import Record, is_good
from sqdf_fast.runs.checkpoint import checkpoints


class BestWeights:
    """``folder/step_{step}``, of the last evaluation at which no judge was below its best.

    Raises:
        UserError: the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, evaluations: Sequence[Record], save: Callable[[Path], None]) -> None:
        """Write the weights of the last of ``evaluations`` with ``save`` in the place of older ones, if it is good."""
        if not is_good(evaluations):
            return
        path = self._of(int(evaluations[-1]["step"]))
        with atomic_folder(path) as folder:
            save(folder)
        for old in checkpoints(self.folder):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def restore(self, step: int, policy: Path) -> bool:
        """Put the weights of ``step`` in the place of the folder ``policy``; False where they are not kept."""
        if not self._of(step).is_dir():
            return False
        with atomic_folder(policy) as folder:
            shutil.copytree(self._of(step), folder, dirs_exist_ok=True)
        return True

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"
