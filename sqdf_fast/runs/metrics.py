"""``metrics.jsonl``: one JSON object per line, appended during a run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors

if TYPE_CHECKING:
    from typing_extensions import Self

Record = dict[str, Any]


class MetricsLog:
    """Appends records to a file without buffering; a context manager.

    Opening the file again removes a line that an interrupted process left half-written.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            _rewrite(path, read_metrics(path))
        self._file = _open(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises UserError when a value is not finite or the disk refuses."""
        _refuse_non_finite(record, record.get("step"))
        line = (json.dumps(record) + "\n").encode()
        with disk_errors(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, step: int, evaluated: int) -> None:
        """Drop what a resumed run writes again: steps after ``step``, evaluations after ``evaluated``, and the end."""
        self._file.close()
        kept = [
            record
            for record in read_metrics(self.path)
            if record.get("kind") != "end"
            and record["step"] <= (evaluated if record.get("kind") in ("evaluation", "alarm") else step)
        ]
        _rewrite(self.path, kept)
        self._file = _open(self.path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of ``path`` in order, without an incomplete last line.

    Raises:
        UserError: the file is missing, or a line before the last is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"metrics {path}: cannot be read ({error.strerror}); give the folder of a run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"metrics {path}: line {number} is damaged; delete that line")
    return records


def parse_record(line: str | bytes) -> Record | None:
    """A line of metrics.jsonl; None if it is not a JSON object with a ``step``."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _open(path: Path) -> io.FileIO:
    with disk_errors(path):
        # Unbuffered, so that closing the file does not repeat a failed write.
        return io.FileIO(path, "a")


def _rewrite(path: Path, records: list[Record]) -> None:
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _refuse_non_finite(value: Any, step: Any, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_non_finite(item, step, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_non_finite(item, step, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{key} is {value} at step {step}: the run has diverged; lower the learning rate or raise alpha, "
            "and resume from the last checkpoint"
        )
