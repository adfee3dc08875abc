"""The folder of one run and the paths in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sqdf_fast.config import Config, dump_config, make_config, read_config_file
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run: config.yaml, metrics.jsonl, lora/ or network/, checkpoints/, samples/, report.html, plan.json."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def policy(self, config: Config) -> Path:
        """Folder of the result: a LoRA for diffusers' load_lora_weights, or the trained network."""
        return self.path / ("network" if config.policy.kind == "full" else "lora")

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raises UserError when ``path`` exists and is not an empty folder."""
        with disk_errors(path):
            occupied = os.path.exists(path) and (not os.path.isdir(path) or bool(os.listdir(path)))
        if occupied:
            raise UserError(f"run folder {path} exists; continue it with --resume {path}, or choose another --output")

    @staticmethod
    def create(path: Path, config: Config) -> RunFolder:
        """Start a new run. Raises UserError when ``path`` is not empty or cannot be written."""
        RunFolder.refuse_existing(path)
        run = RunFolder(path)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            run.config.write_text(dump_config(config), encoding="utf-8")
        return run

    @staticmethod
    def open(path: Path) -> tuple[RunFolder, Config]:
        """An existing run and its configuration. Raises UserError for any other folder."""
        run = RunFolder(path)
        if not os.path.isfile(run.config):
            raise UserError(
                f"{path} is not a run folder: it has no config.yaml; give the folder that `sqdf-fast train` wrote"
            )
        return run, make_config(file=read_config_file(run.config))

    @staticmethod
    def next_free(parent: Path, name: str) -> Path:
        """``parent/name-001`` or the first number after it that is free."""
        return next(path for number in count(1) if not (path := parent / f"{name}-{number:03d}").exists())
