"""Plots of what is recorded of the fused ops.

For every device: bench_<device>_bandwidth.png, achieved bandwidth beside that of a plain copy of as many bytes in the
same run, and bench_<device>_time_<dtype>.png, time relative to eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from harness.benchmark import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

COLORS = {"eager": "#8c8c8c", "compile": "#e08a1e", "native": "#1f6fb4", "triton": "#1f6fb4"}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "native": "native", "triton": "Triton"}
SIZES = {"sd15": "SD1.5", "sdxl": "SDXL", "video": "video", "beyond-cache": "beyond\ncache"}
PANELS = (("denoise_step", "given"), ("denoise_step", "drawn"), ("posterior_mean", ""))
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
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
    """Draw one recorded file; `name` is the device's in the images' file names. A file without fused ops has none."""
    rows = [row for row in result["rows"] if row["size"] in SIZES and row["op"] in dict(PANELS)]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    machine = result["machine"]
    threads = f"{machine['torch_threads']} thread{'s' * (machine['torch_threads'] > 1)}"
    device = machine["gpu"] if result["device"] == "cuda" else f"{machine['cpu']}, {threads}"
    figures = {}
    with plt.rc_context(STYLE):
        if dtypes:
            lines = {f", {dtype}": {"direction": "both", "dtype": dtype} for dtype in dtypes}
            title = f"Achieved bandwidth, forward + backward, {device}"
            height = 1.2 + 4.2 * len(dtypes)
            figures["bandwidth"] = _panels(rows, lines, title, "GB/s", height, _bandwidth, sharey="row")
        for dtype in dtypes:
            lines = {f": {title}": {"direction": way, "dtype": dtype} for way, title in DIRECTIONS.items()}
            title = f"Time relative to eager PyTorch (shorter is better), {device}, {dtype}"
            figures[f"time_{dtype}"] = _panels(rows, lines, title, "time / eager", 10.5, _times)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"bench_{name}_{kind}.png" for kind in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            figure.savefig(path)
            plt.close(figure)
        return paths


def _panels(
    rows: list[Row],
    lines: Mapping[str, Mapping[str, str]],
    heading: str,
    ylabel: str,
    height: float,
    draw: Callable[[Axes, list[Row]], None],
    sharey: str = "none",
) -> Figure:
    """A panel an op; `lines`: the fields of the rows of each line of panels, by what its titles end with."""
    figure, axes = plt.subplots(
        len(lines), len(PANELS), figsize=(13, height), squeeze=False, sharey=sharey, layout="constrained"
    )
    figure.suptitle(heading, fontsize=14)
    for line, (title, fields) in zip(axes, lines.items(), strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            own = list(_select(rows, op=op, noise=noise, **fields))
            if own:
                draw(panel, own)
                panel.set_title(f"{op}, noise {noise}{title}" if noise else op + title)
            else:
                panel.set_axis_off()
        line[0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bandwidth(panel: Axes, rows: list[Row]) -> None:
    """Bytes moved forward + backward on x, GB/s on y, the copy as the ceiling."""
    copies = sorted({(row["bytes_moved"] / 1e6, row["copy_gb_per_second"], SIZES[row["size"]]) for row in rows})
    moved, speed, names = zip(*copies, strict=True)
    panel.plot(moved, speed, color="black", linestyle="--", marker="_", markersize=14, linewidth=1.5, label="copy")
    panel.set_xscale("log")
    panel.set_xticks(moved, [f"{name}\n{value:.0f} MB" for name, value in zip(names, moved, strict=True)])
    panel.xaxis.set_minor_locator(NullLocator())
    for name in _implementations(rows):
        points = sorted((r["bytes_moved"] / 1e6, r["gb_per_second"]) for r in _select(rows, implementation=name))
        panel.plot(*zip(*points, strict=True), marker="o", linewidth=2, color=COLORS[name], label=NAMES[name])
    panel.set_xlabel("size and megabytes moved")
    panel.margins(x=0.12)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_locator(NullLocator())


def _times(panel: Axes, rows: list[Row]) -> None:
    """Bars of time relative to eager, a group a size."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    names = [name for name in _implementations(rows) if name != "eager"]
    width = 0.8 / len(names)
    panel.axhline(1, color=COLORS["eager"], linestyle="--", linewidth=1.5, label=NAMES["eager"])
    for number, implementation in enumerate(names):
        found = {row["size"]: row["times_eager"] for row in _select(rows, implementation=implementation)}
        places = [index for index, size in enumerate(sizes) if found.get(size)]
        heights = [1 / found[sizes[index]] for index in places]
        left = [index + (number - (len(names) - 1) / 2) * width for index in places]
        bars = panel.bar(left, heights, width, color=COLORS[implementation], label=NAMES[implementation])
        panel.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=9, padding=1)
    panel.set_xticks(range(len(sizes)), [SIZES[size] for size in sizes])
    panel.grid(axis="x", visible=False)
    panel.set_ylim(0, max(1.1, 1.12 * panel.dataLim.ymax))


def _select(rows: list[Row], **fields: str) -> Iterator[Row]:
    return (row for row in rows if all(row[name] == value for name, value in fields.items()))


def _implementations(rows: list[Row]) -> list[str]:
    return [name for name in COLORS if any(row["implementation"] == name for row in rows)]
