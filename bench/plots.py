"""Draws recorded benchmark results and writes their tables into docs/benchmarks.md and the pages of `pages.PAGES`.

    python bench/plots.py bench/results/*.json

For every device: bench_<device>_bandwidth.png, achieved bandwidth under the ceiling that a plain copy of as many
bytes sets in the same run, and bench_<device>_time_<dtype>.png, time relative to eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from fused_ops.page import MARKS, results_section
from fused_ops.summary import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from pages import write_pages

DOCS = Path(__file__).parents[1] / "docs"

COLOURS = {"eager": "#8c8c8c", "compile": "#e08a1e", "native": "#1f6fb4", "triton": "#1f6fb4"}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "native": "native", "triton": "Triton"}
SIZES = {"sd15": "SD1.5", "sdxl": "SDXL", "video": "video", "beyond-cache": "beyond\ncache"}
PANELS = (("denoise_step", "given"), ("denoise_step", "drawn"), ("posterior_mean", ""))
DTYPES = ("float32", "bfloat16")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "savefig.dpi": 130,
}


def draw(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """The pictures of one recorded file; `name` is the device's in their file names."""
    rows = [row for row in result["rows"] if row["size"] in SIZES]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    device = _device(result)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        pictures = {f"bench_{name}_bandwidth.png": _bandwidth(rows, dtypes, device)}
        for dtype in dtypes:
            own = [row for row in rows if row["dtype"] == dtype]
            pictures[f"bench_{name}_time_{dtype}.png"] = _time(own, f"{device}, {dtype}")
        for file, figure in pictures.items():
            figure.savefig(folder / file)
            plt.close(figure)
            written.append(folder / file)
    return written


def _bandwidth(rows: list[Row], dtypes: list[str], device: str) -> Figure:
    """A panel an op and dtype: bytes moved forward + backward on x, GB/s on y, the copy as the ceiling."""
    figure, axes = plt.subplots(
        len(dtypes),
        len(PANELS),
        figsize=(13, 1.2 + 4.2 * len(dtypes)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    figure.suptitle(f"Achieved bandwidth, forward + backward, {device}", fontsize=14)
    for line, dtype in zip(axes, dtypes, strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            own = list(_select(rows, op=op, noise=noise, direction="both", dtype=dtype))
            if not own:
                panel.set_axis_off()
                continue
            _ceiling(panel, own)
            for implementation in _implementations(own):
                points = sorted(
                    (row["bytes_moved"] / 1e6, row["gb_per_second"])
                    for row in _select(own, implementation=implementation)
                )
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    linewidth=2,
                    color=COLOURS[implementation],
                    label=NAMES[implementation],
                )
            panel.set_title(f"{_title(op, noise)}, {dtype}")
            panel.set_xlabel("size and megabytes moved")
            panel.margins(x=0.12)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.yaxis.set_minor_locator(NullLocator())
        line[0].set_ylabel("GB/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _ceiling(panel: Axes, rows: list[Row]) -> None:
    points = sorted({(row["bytes_moved"] / 1e6, row["copy_gb_per_second"], SIZES[row["size"]]) for row in rows})
    moved, speed, names = zip(*points, strict=True)
    panel.plot(moved, speed, color="black", linestyle="--", marker="_", markersize=14, linewidth=1.5, label="copy")
    panel.set_xscale("log")
    panel.set_xticks(moved, [f"{name}\n{value:.0f} MB" for name, value in zip(names, moved, strict=True)])
    panel.xaxis.set_minor_locator(NullLocator())


def _time(rows: list[Row], device: str) -> Figure:
    """A panel an op and direction: bars of time relative to eager, a group a size."""
    directions = ("forward", "backward", "both")
    figure, axes = plt.subplots(len(directions), len(PANELS), figsize=(13, 10.5), layout="constrained")
    figure.suptitle(f"Time relative to eager PyTorch (shorter is better), {device}", fontsize=14)
    for line, direction in zip(axes, directions, strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            own = list(_select(rows, op=op, noise=noise, direction=direction))
            if not own:
                panel.set_axis_off()
                continue
            _bars(panel, own)
            spoken = "forward + backward" if direction == "both" else direction
            panel.set_title(f"{_title(op, noise)}: {spoken}")
        line[0].set_ylabel("time / eager")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bars(panel: Axes, rows: list[Row]) -> None:
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    names = [name for name in _implementations(rows) if name != "eager"]
    width = 0.8 / len(names)
    panel.axhline(1, color=COLOURS["eager"], linestyle="--", linewidth=1.5, label=NAMES["eager"])
    for number, implementation in enumerate(names):
        found = {row["size"]: row["times_eager"] for row in _select(rows, implementation=implementation)}
        places = [index for index, size in enumerate(sizes) if found.get(size)]
        heights = [1 / found[sizes[index]] for index in places]
        left = [index + (number - (len(names) - 1) / 2) * width for index in places]
        bars = panel.bar(left, heights, width, color=COLOURS[implementation], label=NAMES[implementation])
        panel.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=9, padding=1)
    panel.set_xticks(range(len(sizes)), [SIZES[size] for size in sizes])
    panel.grid(axis="x", visible=False)
    panel.set_ylim(0, max(1.1, 1.12 * panel.dataLim.ymax))


def _select(rows: list[Row], **fields: str) -> Iterator[Row]:
    return (row for row in rows if all(row[name] == value for name, value in fields.items()))


def _implementations(rows: list[Row]) -> list[str]:
    return [name for name in COLOURS if any(row["implementation"] == name for row in rows)]


def _title(op: str, noise: str) -> str:
    return f"{op}, noise {noise}" if noise else op


def _device(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if result["device"] == "cuda":
        return str(machine["gpu"])
    return f"{machine['cpu']}, {machine['torch_threads']} thread{'s' * (machine['torch_threads'] > 1)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="recorded results, bench/results/<device>.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages (default: %(default)s)")
    given = parser.parse_args(arguments)
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in given.files}
    pictures = {name: draw(result, name, given.docs / "images") for name, result in results.items()}
    page = given.docs / "benchmarks.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(before + results_section(results, pictures) + after, encoding="utf-8")
    pages = [page, *write_pages(results, given.docs)]
    for path in (*(path for drawn in pictures.values() for path in drawn), *pages):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
