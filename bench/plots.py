"""Plots: what is recorded of the fused ops, and curves of runs.

For every device: bench_<device>_bandwidth.png, achieved bandwidth beside that of a plain copy of as many bytes in the
same run, and bench_<device>_time_<dtype>.png, time relative to eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from harness.benchmark import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

COLOURS = {"eager": "#8c8c8c", "compile": "#e08a1e", "native": "#1f6fb4", "triton": "#1f6fb4"}
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
    with plt.rc_context(STYLE):
        figures = {f"bench_{name}_bandwidth": _bandwidth(rows, dtypes, device)} if dtypes else {}
        for dtype in dtypes:
            own = [row for row in rows if row["dtype"] == dtype]
            figures[f"bench_{name}_time_{dtype}"] = _time(own, f"{device}, {dtype}")
        return [_save(figure, folder / f"{file}.png") for file, figure in figures.items()]


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, labels: tuple[str, str]
) -> Path:
    """Points by the name of their curve, as one image; `labels` of x and y."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*points, strict=True), marker="osD^vX"[index % 6], markersize=4, label=name)
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
        axes.legend(frameon=False, fontsize=9)
        return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def _panels(titles: Sequence[str], heading: str, height: float, sharey: str = "none") -> tuple[Figure, Any]:
    """A line of panels a title, a panel an op."""
    figure, axes = plt.subplots(
        len(titles), len(PANELS), figsize=(13, height), squeeze=False, sharey=sharey, layout="constrained"
    )
    figure.suptitle(heading, fontsize=14)
    for line, title in zip(axes, titles, strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            panel.set_title(f"{op}, noise {noise}{title}" if noise else op + title)
    return figure, axes


def _legend(figure: Figure, axes: Any) -> Figure:
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bandwidth(rows: list[Row], dtypes: list[str], device: str) -> Figure:
    """A panel an op and dtype: bytes moved forward + backward on x, GB/s on y, the copy as the ceiling."""
    heading = f"Achieved bandwidth, forward + backward, {device}"
    figure, axes = _panels([f", {dtype}" for dtype in dtypes], heading, 1.2 + 4.2 * len(dtypes), sharey="row")
    for line, dtype in zip(axes, dtypes, strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            own = list(_select(rows, op=op, noise=noise, direction="both", dtype=dtype))
            if not own:
                panel.set_axis_off()
                continue
            _ceiling(panel, own)
            for name in _implementations(own):
                points = sorted((r["bytes_moved"] / 1e6, r["gb_per_second"]) for r in _select(own, implementation=name))
                panel.plot(*zip(*points, strict=True), marker="o", linewidth=2, color=COLOURS[name], label=NAMES[name])
            panel.set_xlabel("size and megabytes moved")
            panel.margins(x=0.12)
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.yaxis.set_minor_locator(NullLocator())
        line[0].set_ylabel("GB/s")
    return _legend(figure, axes)


def _ceiling(panel: Axes, rows: list[Row]) -> None:
    points = sorted({(row["bytes_moved"] / 1e6, row["copy_gb_per_second"], SIZES[row["size"]]) for row in rows})
    moved, speed, names = zip(*points, strict=True)
    panel.plot(moved, speed, color="black", linestyle="--", marker="_", markersize=14, linewidth=1.5, label="copy")
    panel.set_xscale("log")
    panel.set_xticks(moved, [f"{name}\n{value:.0f} MB" for name, value in zip(names, moved, strict=True)])
    panel.xaxis.set_minor_locator(NullLocator())


def _time(rows: list[Row], device: str) -> Figure:
    """A panel an op and direction: bars of time relative to eager, a group a size."""
    heading = f"Time relative to eager PyTorch (shorter is better), {device}"
    figure, axes = _panels([f": {spoken}" for spoken in DIRECTIONS.values()], heading, 10.5)
    for line, direction in zip(axes, DIRECTIONS, strict=True):
        for panel, (op, noise) in zip(line, PANELS, strict=True):
            own = list(_select(rows, op=op, noise=noise, direction=direction))
            if own:
                _bars(panel, own)
            else:
                panel.set_axis_off()
        line[0].set_ylabel("time / eager")
    return _legend(figure, axes)


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
