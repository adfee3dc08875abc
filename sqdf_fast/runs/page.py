"""``report.html``: one file that shows what a run did, made from the run folder alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sqdf_fast import __version__
from sqdf_fast.display.chart import MINUS, Line, Point, line_chart, moving_average
from sqdf_fast.display.elements import tile
from sqdf_fast.files import disk_errors
from sqdf_fast.runs.metrics import Record
from sqdf_fast.runs.monitor_section import monitor_section
from sqdf_fast.runs.plan_section import plan_section
from sqdf_fast.runs.run import Run, Summary, cost, read_run, summarise

STYLE = Path(__file__).parent / "report.css"
# Larger pictures are scaled down: a report of 16 pairs stays a few megabytes.
EMBEDDED_SIDE = 384
FILM_ROWS, FILM_STEPS = 6, 7


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not, and return its path.

    Raises:
        UserError: not a run folder, damaged files in it, or the disk refuses.
    """
    run = read_run(run_folder)
    path = run_folder / "report.html"
    partial = path.with_name("report.html.partial")
    with disk_errors(path):
        partial.write_text(render_report(run), encoding="utf-8")
        partial.replace(path)
    return path


def render_report(run: Run) -> str:
    """The page as text. It asks the network for nothing."""
    title = f"{_name(run.config.get('model'))} fine-tuned towards {_name(run.config.get('reward'))}"
    sections = [
        _header(run, title),
        _before_after(run),
        _evaluation_curves(run),
        monitor_section(run.config, run.evaluations, run.alarms),
        _training_curves(run),
        _film(run),
        _cost(run),
        plan_section(run.comparison, run.plan, run.on_gpu),
        _configuration(run),
    ]
    sections.append(_environment(run))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(sections)}<footer>Written by sqdf-fast {escape(__version__)} "
        f"from {escape(run.folder.resolve().name)}.</footer></main></body></html>\n"
    )


def _name(setting: Any) -> str:
    return str(setting).rstrip("/").rsplit("/", 1)[-1] if setting else "unnamed"


def _header(run: Run, title: str) -> str:
    summary = summarise(run.judged)
    planned = run.config.get("steps")
    state = f"{run.last_step} of {planned} steps" if isinstance(planned, int) else f"{run.last_step} steps"
    if run.ended is None:
        state = f"partial run: {state}"
    elif run.ended != "steps":
        state = f"{run.last_step} steps, ended by its {run.ended}"
    facts = [state, f"seed {run.config.get('seed', 'unknown')}"]
    if run.config.get("preset"):
        facts.append(f"preset {run.config['preset']}")
    tiles = "".join(_tiles(summary))
    return (
        f'<h1>{escape(title)}</h1><div class="soft">{escape(" · ".join(facts))}</div>'
        f'<p class="verdict">{escape(summary.verdict)}</p>' + (f'<div class="tiles">{tiles}</div>' if tiles else "")
    )


def _tiles(summary: Summary) -> list[str]:
    tiles = []
    if summary.proxy and summary.proxy_gain is not None:
        tiles.append(
            tile(f"{summary.proxy_gain:+.2f} sd", "proxy reward", _pair(summary.proxy), summary.proxy_gain > 0)
        )
    if summary.true and summary.true_gain is not None:
        tiles.append(
            tile(
                f"{summary.true_gain:+.2f}",
                "true reward, never trained on",
                _pair(summary.true),
                summary.true_gain > 0,
            )
        )
    if summary.accuracy and summary.accuracy_kept is not None:
        tiles.append(tile(f"{summary.accuracy_kept:.0%}", "attribute accuracy kept", _pair(summary.accuracy)))
    if summary.diversity and summary.diversity_kept is not None:
        tiles.append(tile(f"{summary.diversity_kept:.0%}", "diversity kept", _pair(summary.diversity)))
    if summary.alignment:
        chance = "" if summary.shuffled is None else f"; shuffled prompts {summary.shuffled:.2f}"
        tiles.append(
            tile(
                f"{summary.alignment[1]:.2f}",
                "alignment with the prompt",
                f"was {summary.alignment[0]:.2f}{chance}",
            )
        )
    return tiles


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} → {pair[1]:.3f}".replace("-", MINUS)


def _before_after(run: Run) -> str:
    steps = list(run.samples.steps)
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    figures = []
    for index, prompt in enumerate(run.samples.prompts):
        shown = [first] if first == last else [first, last]
        pictures = "".join(
            f"<span>{_picture(run, step, index)}<small>{moment} · step {step}</small></span>"
            for moment, step in zip(("before", "after"), shown, strict=False)
        )
        caption = f"{escape(prompt)} <small>seed {escape(str(run.samples.seeds[index]))}</small>"
        figures.append(f'<figure class="pair"><div>{pictures}</div><figcaption>{caption}</figcaption></figure>')
    note = "Same prompt, same seed: left the base model, right the latest samples of this run."
    if first == last:
        note = "The base model's samples; this run has drawn no later ones yet."
    return f'<h2>Before and after</h2><p class="soft">{note}</p><div class="pairs">{"".join(figures)}</div>'


def _picture(run: Run, step: int, index: int) -> str:
    path = run.samples.steps[step][index]
    source = None if path is None else data_uri(path)
    if source is None:
        return '<span class="missing">missing</span>'
    return f'<img src="{source}" alt="{escape(run.samples.prompts[index])}, step {step}">'


def data_uri(path: Path) -> str | None:
    """The picture itself, in base64; None where the file is not a whole picture."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            kind = "png"
            if max(picture.size) > EMBEDDED_SIDE:
                picture = picture.convert("RGB")
                picture.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                picture.save(buffer, format="JPEG", quality=90)
                content, kind = buffer.getvalue(), "jpeg"
    except (OSError, SyntaxError, UnidentifiedImageError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _training_curves(run: Run) -> str:
    charts = [
        _smoothed_chart(run.steps, "Reward of the samples in the step", "reward_mean", spread="reward_std"),
        _smoothed_chart(run.steps, "KL from the reference", "kl_mean", colour=4),
        _kl_by_index(run.steps),
        _smoothed_chart(run.steps, "Loss", "loss"),
        _smoothed_chart(run.steps, "Gradient norm before clipping", "grad_norm", colour=3),
    ]
    return _chart_section("Training", "Each optimizer step, pale, under its moving average.", charts)


def _evaluation_curves(run: Run) -> str:
    measure = next((record["diversity_measure"] for record in run.evaluations if record.get("diversity_measure")), "")
    charts = [
        _proxy_and_true(run.evaluations),
        line_chart(
            f"Diversity of {measure}" if measure else "Diversity",
            [Line("", _points(run.evaluations, "eval_diversity"), 3)],
            include=(0,),
        ),
        line_chart(
            "Alignment with the prompt",
            [
                Line("own prompt", _points(run.evaluations, "eval_alignment"), 1),
                Line("shuffled prompts", _points(run.evaluations, "eval_alignment_shuffled"), 2, dashed=True),
            ],
        ),
        line_chart(
            "Attribute accuracy",
            [Line("", _points(run.evaluations, "eval_attribute_accuracy"), 4)],
            include=(0, 1),
        ),
    ]
    used = (run.config.get("evaluation") or {}).get("prompts")
    held_out = used is not None and used != run.config.get("prompts")
    origin = f"The prompts of {used}, which training never used" if held_out else "The prompts of the training"
    return _chart_section("Evaluation", f"{escape(origin)}; the same seeds each time.", charts)


def _chart_section(heading: str, note: str, charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    return f'<h2>{heading}</h2><p class="soft">{note}</p><div class="charts">{drawn}</div>' if drawn else ""


def _points(records: Sequence[Record], key: str) -> list[Point]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _smoothed_chart(records: Sequence[Record], title: str, key: str, colour: int = 1, spread: str | None = None) -> str:
    raw = _points(records, key)
    window = len(raw) // 10 | 1
    if window < 3:
        return line_chart(title, [Line("", raw, colour)])
    mean = moving_average(raw, window)
    label, band = f"mean of {window} steps", None
    widths = moving_average(_points(records, spread), window) if spread else []
    if len(widths) == len(mean):
        band = [(y - width, y + width) for (_, y), (_, width) in zip(mean, widths, strict=True)]
        label += " \N{PLUS-MINUS SIGN} standard deviation of a batch"
    return line_chart(title, [Line("", raw, colour, faint=True), Line(label, mean, colour, band=band)])


def _proxy_and_true(evaluations: Sequence[Record]) -> str:
    proxy = _with_interval(evaluations, "eval_proxy_reward", Line("proxy (trained on)", (), 1))
    true = _with_interval(evaluations, "eval_true_reward", Line("true (never trained on)", (), 2, right=True))
    title = "Proxy and true reward" if true.points else "Reward"
    return line_chart(title, [proxy, true], y_label="proxy", right_label="true")


def _with_interval(evaluations: Sequence[Record], key: str, line: Line) -> Line:
    low, high = (_points(evaluations, f"{key}_{end}") for end in ("low", "high"))
    points = _points(evaluations, key)
    complete = len(low) == len(high) == len(points)
    band = [(bottom, top) for (_, bottom), (_, top) in zip(low, high, strict=True)] if complete else None
    return replace(line, points=points, band=band)


def _kl_by_index(records: Sequence[Record]) -> str:
    """KL against the position in the denoising schedule, in three parts of the run."""
    measured = [record for record in records if record.get("kl_by_index")]
    parts = 3 if len(measured) >= 9 else 1
    names = ("first third", "second third", "last third") if parts == 3 else ("whole run",)
    lines = []
    for part, name in enumerate(names):
        share = measured[len(measured) * part // parts : len(measured) * (part + 1) // parts]
        lines.append(Line(name, _mean_by_index(share), (3, 1, 4)[part]))
    return line_chart("KL by denoising index (0 = noisiest)", lines, x_label="index")


def _mean_by_index(records: Sequence[Record]) -> list[Point]:
    values: dict[int, list[float]] = {}
    for record in records:
        for index, value in record["kl_by_index"].items():
            values.setdefault(int(index), []).append(value)
    return [(index, sum(found) / len(found)) for index, found in sorted(values.items())]


def _film(run: Run) -> str:
    steps = _evenly(list(run.samples.steps), FILM_STEPS)
    if len(steps) < 3:
        return ""
    rows = []
    for index in _evenly(list(range(len(run.samples.prompts))), FILM_ROWS):
        prompt = run.samples.prompts[index]
        cells = "".join(f"<td>{_picture(run, step, index)}</td>" for step in steps)
        rows.append(f'<tr><td class="prompt">{escape(prompt)}</td>{cells}</tr>')
    heads = "".join(f'<th scope="col">step {step}</th>' for step in steps)
    return (
        '<h2>On the way</h2><p class="soft">The same seeds as training goes on.</p>'
        f'<div class="film"><table><tr><td></td>{heads}</tr>{"".join(rows)}</table></div>'
    )


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` items, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(position * (len(items) - 1) / (count - 1))] for position in range(count)]


def _cost(run: Run) -> str:
    tiles = "".join(tile(value, name) for name, value in cost(run).items())
    return f'<h2>Cost</h2><div class="tiles">{tiles}</div>'


def _configuration(run: Run) -> str:
    flat = {key: value for key, value in run.config.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in run.config.items() if isinstance(value, Mapping) and value}
    tables = _table(flat, "run") + "".join(_table(_flattened(value), key) for key, value in sections.items())
    return f'<h2>Configuration</h2><div class="columns">{tables}</div>'


def _environment(run: Run) -> str:
    if not run.environment:
        return ""
    return f'<h2>Environment</h2><div class="columns">{_table(run.environment)}</div>'


def _flattened(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _table(values: Mapping[str, Any], caption: str = "") -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>'
        for name, value in values.items()
    )
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{head}{rows}</table>" if rows else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return str(value)
