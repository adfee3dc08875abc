"""One run of one method: its folder, settings and progress."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqdf_fast.compare.protocol import parse_budget
from sqdf_fast.config import Config, dotted, settings_of, with_settings
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors
from sqdf_fast.runs.checkpoint import checkpoints
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.runs.metrics import parse_record

# A limit ends the runs before this number of steps.
ENDLESS = 10**9


class TrainingFreeSpec(NamedTuple):
    """A method that improves samples without training: one evaluation per number of candidates, or per scale."""

    kind: Literal["best-of-n", "guided"]
    sweep: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        folder: run folder; its log is beside it.
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
        """Short display name."""
        return f"{self.method} seed {self.seed}" if self.trial is None else f"{self.method} trial {self.trial}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def ended(self) -> bool:
        """Whether the run is finished and is never started again."""
        return is_finished(self.folder)


def job_config(base: Config, seed: int, budget: str, points: int) -> Config:
    """A method's configuration for a run of that seed and budget, with a checkpoint after each evaluation."""
    settings = {
        "seed": seed,
        "steps": ENDLESS,
        "checkpoint_every": 0,
        "limits": parse_budget(budget).model_dump(),
        "evaluation": {"points": points, "every": 0, "checkpoint": True},
    }
    return with_settings(base, settings)


def is_finished(folder: Path) -> bool:
    """Whether a run folder's metrics say that the run has ended."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return False
    return (parse_record(lines[-1]) or {}).get("kind") == "end" if lines else False


def make_ready(job: Job) -> bool:
    """Prepare a job's folder; True if its run is to be continued, False if it starts from scratch.

    A run that was killed before its first checkpoint is deleted.

    Raises:
        UserError: the folder holds a run of other settings, or the disk refuses.
    """
    if checkpoints(RunFolder(job.folder).checkpoints):
        check_settings(job)
        return True
    with disk_errors(job.folder):
        if job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
    return False


def check_settings(job: Job) -> None:
    """Raises UserError when the job's folder holds a run of other settings."""
    ours, theirs = (_comparable(config) for config in (job.config, RunFolder.open(job.folder)[1]))
    for key in {**theirs, **ours}:
        found, wanted = theirs.get(key), ours.get(key)
        if found != wanted:
            raise UserError(
                f"run {job.folder} has other settings ({key} is {found}, not {wanted}); choose another --output, or "
                "delete that folder to run it again"
            )


def _comparable(config: Config) -> dict[str, Any]:
    values = settings_of(config)
    if config.vram is not None:
        # The planner fills these in.
        for key in ("execution", "sampling", "dtype", "optimizer"):
            values.pop(key)
    return dotted(values)


@dataclass
class Tail:
    """Follows a run's metrics while another process writes them.

    Attributes:
        rows, seconds: UNet evaluations and time of training so far.
        step: last step.
        proxy: proxy reward of the last evaluation.
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
                if file.seek(0, 2) < self._offset:
                    # A resumed run drops what it writes again.
                    self.rows, self.seconds, self.step, self._offset = 0, 0.0, 0, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for record in filter(None, map(parse_record, complete.splitlines())):
            if record.get("kind") == "step":
                self.step = record["step"]
                self.rows += record.get("unet_evaluations") or 0
                self.seconds += record.get("seconds") or 0.0
            elif record.get("kind") == "evaluation":
                self.proxy = record.get("eval_proxy_reward")

    def share(self, config: Config) -> float:
        """How much of the run's limit is spent, in [0, 1]."""
        limits = config.limits
        rows = self.rows / limits.unet_evaluations if limits.unet_evaluations else 0.0
        return min(1.0, max(rows, self.seconds / limits.seconds if limits.seconds else 0.0))
