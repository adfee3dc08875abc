"""A run's metrics and images in TensorBoard, Weights & Biases and trackio; metrics.jsonl stays the source of truth."""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sqdf_fast.config import dotted
from sqdf_fast.errors import UserError
from sqdf_fast.files import disk_errors
from sqdf_fast.rewards.preprocess import to_pil
from sqdf_fast.runs.metrics import Record

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECT = "sqdf-fast"
NAMES = ("tensorboard", "wandb", "trackio")
FOLDER = "trackers"
_KINDS = {"step": "train", "evaluation": "evaluation"}


def refuse_missing(names: Iterable[str]) -> None:
    """Raises UserError when a tracker is unknown or its package is not installed."""
    for name in names:
        if name not in NAMES:
            raise UserError(f"logging.trackers: {name!r} is unknown; allowed: {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logging.trackers: {name} is not installed; run `pip install {name}` or leave it out")


class Trackers:
    """Accelerate's trackers of one run. A tracker that fails is dropped with one message; training continues.

    Args:
        trackers: started `accelerate.tracking.GeneralTracker` objects.
        report: receiver of the message about a tracker that failed.
    """

    def __init__(self, trackers: Sequence[Any], report: Callable[[str], None]) -> None:
        self._trackers, self._report = list(trackers), report

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        run_folder: Path,
        config: Mapping[str, Any],
        report: Callable[[str], None],
        resumed_step: int | None = None,
    ) -> Self:
        """Start the named trackers; local files go to ``RUN/trackers/``.

        In a resumed run, TensorBoard hides later steps of the killed run; wandb ignores steps that it already has;
        trackio shows them twice, with equal values.

        Args:
            names: any of `NAMES`.
            config: nested settings of the run.
            report: receiver of the message about a tracker that failed.
            resumed_step: step of the checkpoint that the run continues from; None for a new run.

        Raises:
            UserError: a package is missing, a tracker does not start, or the disk refuses.
        """
        refuse_missing(names)
        return cls([_start(name, run_folder, config, resumed_step) for name in names], report)

    def log(self, record: Record) -> None:
        """Log the numbers of a record of `metrics.jsonl`."""
        if values := scalars(record):
            self._each(lambda tracker: tracker.log(values, step=record["step"]))

    def log_images(self, step: int, images: Tensor, prompts: Sequence[str]) -> None:
        """Log each image as a series of its own, ``samples/NN``, captioned with its prompt.

        Args:
            images: float [N, 3, H, W] in [0, 1].
            prompts: captions, one per image.
        """
        captioned = [(np.asarray(image), prompt) for image, prompt in zip(to_pil(images), prompts, strict=True)]
        self._each(lambda tracker: _log_images(tracker, step, captioned))

    def close(self) -> None:
        """Flush and end every tracker."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            # No error of a tracker's network or disk may end the run.
            except Exception as error:
                self._trackers.remove(tracker)
                self._report(f"{tracker.name} failed and receives no more data of this run: {_line(error)}")


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a step or evaluation record by tag ``train/``, ``evaluation/`` and ``kl/index_I``."""
    prefix = _KINDS.get(record.get("kind", ""))
    if prefix is None:
        return {}
    values = {
        f"{prefix}/{key.removeprefix('eval_')}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return values | {f"kl/index_{index}": value for index, value in record.get("kl_by_index", {}).items()}


def _start(name: str, run_folder: Path, config: Mapping[str, Any], resumed_step: int | None) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Accelerate's logger requires it.
    PartialState()
    folder = run_folder / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        arguments, options = _arguments(name, run_folder, folder, resumed_step)
    tracker = LOGGER_TYPE_TO_CLASS[name](*arguments, **options)
    try:
        tracker.start()
        if resumed_step is None:
            # Numbers, booleans and text are stored as they are, everything else as text.
            settings = dotted(config).items()
            known = (bool, int, float, str)
            tracker.store_init_configuration({key: x if isinstance(x, known) else str(x) for key, x in settings})
    # Not logged in, no network, a full disk: each package has its own exceptions.
    except Exception as error:
        raise UserError(f"logging.trackers: {name} does not start ({_line(error)}); fix that or leave it out") from None
    return tracker


def _arguments(name: str, run_folder: Path, folder: Path, resumed_step: int | None) -> tuple[list[Any], dict[str, Any]]:
    if name == "tensorboard":
        return [name, folder], {} if resumed_step is None else {"purge_step": resumed_step + 1}
    run_id = _run_id(folder)
    if name == "wandb":
        return [PROJECT], {"id": run_id, "name": run_folder.name, "dir": str(folder), "resume": "allow"}
    # trackio continues a run by its name.
    return [PROJECT], {"name": f"{run_folder.name}-{run_id}", "resume": "allow"}


def _run_id(folder: Path) -> str:
    """The run's identity on a server, kept in its folder."""
    path = folder / "id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _log_images(tracker: Any, step: int, captioned: Sequence[tuple[Any, str]]) -> None:
    if tracker.name == "tensorboard":
        # TensorBoard has no captions but its tags.
        images = {f"samples/{index:02d} {prompt}": image[None] for index, (image, prompt) in enumerate(captioned)}
        tracker.log_images(images, step=step, dataformats="NHWC")
        tracker.tracker.flush()
    else:
        # accelerate passes no captions and logs no images for trackio.
        media = importlib.import_module(tracker.name)
        values = {f"samples/{i:02d}": media.Image(image, caption=prompt) for i, (image, prompt) in enumerate(captioned)}
        tracker.log(values, step=step)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
