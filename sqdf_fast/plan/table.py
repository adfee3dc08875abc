"""The memory table of docs/memory.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqdf_fast.config import with_settings
from sqdf_fast.plan.device import GIB, find_device
from sqdf_fast.plan.fake import only_new_garbage
from sqdf_fast.plan.planner import Planner, paper_config
from sqdf_fast.plan.search import Choice

MARKS = ("<!-- table: python -m sqdf_fast.plan table --write -->\n", "<!-- end of table -->\n")
_CARD = 24 * GIB


@dataclass(frozen=True)
class Row:
    """One way to train one model.

    Attributes:
        title: title of the row; model: name of a known model; settings: changes to the paper's settings.
        quantization: quantization of the base; target_gib: the project's goal.
    """

    title: str
    model: str
    target_gib: float
    quantization: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)


_FULL = {"policy.kind": "full", "optimizer.kind": "adamw8bit"}
ROWS = (
    Row("SD1.5 512 px, LoRA", "sd15", 2.5),
    Row("SD1.5 512 px, full", "sd15", 5.0, settings=_FULL),
    Row("SDXL 1024 px, LoRA", "sdxl", 6.5),
    Row("SDXL 1024 px, LoRA, NF4 base", "sdxl", 6.0, "nf4"),
    Row("SDXL 1024 px, full", "sdxl", 14.0, settings=_FULL),
    Row("SD3.5-medium 1024 px, LoRA", "sd35-medium", 7.0),
    Row("FLUX.1-dev 1024 px, LoRA, NF4 base", "flux1-dev", 9.5, "nf4"),
)


@dataclass(frozen=True)
class Line:
    """Simulated figures of a row.

    Attributes:
        step_gib: peak of the optimizer step in the plan of the least peak; peak_gib: with the sampling that feeds it.
        batch_bytes: bytes that the step of the full batch holds above that of a single sample.
        latent_bytes: bytes of one sample's latents in float32.
        seconds: predicted time of a step with its sampling on a 24 GB GPU.
        fast_gib, fast_seconds, executor: of the fastest plan for 24 GB; fits: whether there is one.
    """

    step_gib: float
    peak_gib: float
    batch_bytes: int
    latent_bytes: int
    seconds: float
    fast_gib: float
    fast_seconds: float
    executor: str
    fits: bool


def simulated(row: Row, use_cache: bool = True) -> Line:
    """Plan a row; minutes for a large model."""
    config = with_settings(paper_config(row.model), {**row.settings, "execution.quantization": row.quantization})
    planner, device = Planner(config, use_cache=use_cache), find_device(None, _CARD)
    with only_new_garbage():
        small, fast = planner.smallest(device), planner.plan(_CARD, device)
        more = planner.batch_cost(Choice(small.settings, {}, {}))
    return Line(
        step_gib=max(stage.live_gib for stage in small.stages if not stage.name.startswith("sampl")),
        peak_gib=small.peak_gib,
        batch_bytes=more,
        latent_bytes=4 * planner.profile(row.quantization).latent,
        seconds=small.predicted_seconds,
        fast_gib=fast.peak_gib,
        fast_seconds=fast.predicted_seconds,
        executor=fast.executor,
        fits=fast.fits,
    )


def memory_table(lines: Sequence[Line]) -> str:
    """Markdown table of ROWS: the smallest plan, and the fastest for 24 GB."""
    head = [
        "| | smallest: optimizer step | with sampling | goal | 64 samples over 1 | s a step | fastest in 24 GB: peak | "
        "s a step | executor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(_markdown(*pair) for pair in zip(ROWS, lines, strict=True))]) + "\n"


def _markdown(row: Row, line: Line) -> str:
    return (
        f"| {row.title} | {line.step_gib:.2f} GiB | {line.peak_gib:.2f} GiB | {row.target_gib:g} | "
        f"{line.batch_bytes / 2**20:.0f} MiB | {line.seconds:.0f} | "
        f"{line.fast_gib:.2f} GiB{'' if line.fits else ' (does not fit)'} | {line.fast_seconds:.0f} | {line.executor} |"
    )


def write_between_marks(page: Path, text: str) -> None:
    """Replace the text between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + after, encoding="utf-8")
