"""One run of one method: where it lies, how far it is, what it is run with."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqdf_fast.compare.protocol import parse_budget
from sqdf_fast.config import Config, settings_of, with_settings
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors
from sqdf_fast.runs.checkpoint import checkpoints
from sqdf_fast.runs.folder import RunFolder

# A limit ends the runs; the number of steps must not.
ENDLESS = 10**9


@dataclass(frozen=True)
class TrainingFreeSpec:
    """A method that improves samples without training.

    Attributes:
        sweep: candidates of "best-of-n", scales of "guided"; one evaluation each.
    """

    kind: Literal["best-of-n", "guided"]
    sweep: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        folder: run folder; its log lies beside it.
        trial: number of the tuning trial; None: a reported run.
        training_free: method that samples the base model; None: the run trains.
    """

    method: str
    seed: int
    config: Config
    folder: Path
    trial: int | None = None
    training_free: TrainingFreeSpec | None = None

    @property
    def name(self) -> str:
        """For people, short."""
        return f"{self.method} seed {self.seed}" if self.trial is None else f"{self.method} trial {self.trial}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def ended(self) -> bool:
        """Whether the run is finished: it is then never started again."""
        return is_finished(self.folder)


def job_config(base: Config, seed: int, budget: str, points: int) -> Config:
    """A method's configuration as a run of that seed and budget, saved after each evaluation."""
    return with_settings(
        base,
        {
            "seed": seed,
            "steps": ENDLESS,
            "checkpoint_every": 0,
            "limits": parse_budget(budget).model_dump(),
            "evaluation": {"points": points, "every": 0, "checkpoint": True},
        },
    )


def is_finished(folder: Path) -> bool:
    """Whether a run folder's metrics say that the run has ended."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().splitlines()
    except OSError:
        return False
    return bool(lines) and _kind(lines[-1]) == "end"


def _kind(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("kind") if isinstance(record, dict) else None


def make_ready(job: Job) -> bool:
    """Prepare a job's folder; whether it is continued (True) or begins (False).

    What a run left that was killed before its first checkpoint is dropped.

    Raises:
        UserError: the folder holds a run of other settings, or the disk refuses.
    """
    run = RunFolder(job.folder)
    if not checkpoints(run.checkpoints):
        with disk_errors(job.folder):
            if job.folder.exists():
                shutil.rmtree(job.folder)
            job.folder.parent.mkdir(parents=True, exist_ok=True)
        return False
    check_settings(job)
    return True


def check_settings(job: Job) -> None:
    """Raises UserError when the job's folder holds a run of other settings."""
    found = RunFolder.open(job.folder)[1]
    ours, theirs = (_comparable(config) for config in (job.config, found))
    if ours != theirs:
        raise UserError(
            f"run {job.folder} is of other settings ({_difference(theirs, ours)}); choose another --output, or delete "
            "that folder to run it again"
        )


def _comparable(config: Config) -> dict[str, Any]:
    values = settings_of(config)
    if config.vram is not None:
        # The plan of a memory budget fills these in.
        for key in ("execution", "sampling", "dtype", "optimizer"):
            values.pop(key)
    return values


def _difference(one: dict[str, Any], two: dict[str, Any], prefix: str = "") -> str:
    for key, value in one.items():
        other = two.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if found := _difference(value, other, f"{prefix}{key}."):
                return found
        elif value != other:
            return f"{prefix}{key} is {value}, not {other}"
    return ""


@dataclass
class Tail:
    """Follows a run's metrics while another process writes them.

    Attributes:
        rows, seconds: what training has cost so far.
        step: the last one; proxy: of the last evaluation.
    """

    path: Path
    rows: int = 0
    seconds: float = 0.0
    step: int = 0
    proxy: float | None = None
    _offset: int = field(default=0, repr=False)

    def read(self) -> None:
        """Take in what was written since."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    # A resumed run drops what it writes again.
                    self.rows, self.seconds, self.step, self._offset = 0, 0.0, 0, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for line in text[:whole].splitlines():
            self._take(line)

    def share(self, config: Config) -> float:
        """How much of the run's limit is spent, in [0, 1]."""
        limits = config.limits
        shares = [0.0]
        if limits.unet_evaluations:
            shares.append(self.rows / limits.unet_evaluations)
        if limits.seconds:
            shares.append(self.seconds / limits.seconds)
        return min(1.0, max(shares))

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if record.get("kind") == "step":
            self.step = record["step"]
            self.rows += record.get("unet_evaluations") or 0
            self.seconds += record.get("seconds") or 0.0
        elif record.get("kind") == "evaluation":
            self.proxy = record.get("eval_proxy_reward")
