"""The plots of a run's page: evaluations, the monitor's scores, training, and the plan beside its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqdf_fast.display.plots import Bars, Chart, Line, Point, bar_chart, line_chart, moving_average
from sqdf_fast.monitor import HELD_OUT, PROXY, TOLERANCE, watched
from sqdf_fast.runs.comparison import GIB, Comparison, Measure
from sqdf_fast.runs.metrics import Record


def evaluation_charts(evaluations: Sequence[Record]) -> list[Chart]:
    """Rewards, diversity, alignment and accuracy by step, as far as they were measured."""
    measure = next((record["diversity_measure"] for record in evaluations if record.get("diversity_measure")), "")
    proxy = _with_interval(evaluations, "eval_proxy_reward", Line("proxy (trained on)", (), 1))
    true = _with_interval(evaluations, "eval_true_reward", Line("true (never trained on)", (), 2, right=True))
    alignment = [
        Line("own prompt", _points(evaluations, "eval_alignment"), 1),
        Line("shuffled prompts", _points(evaluations, "eval_alignment_shuffled"), 2, dashed=True),
    ]
    diversity = Line("", _points(evaluations, "eval_diversity"), 3)
    accuracy = Line("", _points(evaluations, "eval_attribute_accuracy"), 4)
    rewards = "Proxy and true reward" if true.points else "Reward"
    return _drawn(
        line_chart(rewards, [proxy, true], y_label="proxy", right_label="true"),
        line_chart(f"Diversity of {measure}" if measure else "Diversity", [diversity], include=(0,)),
        line_chart("Alignment with the prompt", alignment),
        line_chart("Attribute accuracy", [accuracy], include=(0, 1)),
    )


def training_charts(steps: Sequence[Record]) -> list[Chart]:
    """Reward, KL, loss and gradient norm of each step, and their moving average."""
    return _drawn(
        _smoothed(steps, "Reward of the step's samples", "reward_mean", spread="reward_std"),
        _smoothed(steps, "KL from the reference", "kl_mean", color=4),
        _kl_by_index(steps),
        _smoothed(steps, "Loss", "loss"),
        _smoothed(steps, "Gradient norm before clipping", "grad_norm", color=3),
    )


def monitor_charts(evaluations: Sequence[Record], alarms: Sequence[Record]) -> list[Chart]:
    """The trained reward beside held-out rewards, the retained fraction of the base model's scores, and the KL."""
    held_out = [key for key in watched(evaluations) if key.startswith(HELD_OUT)]
    # Rewards have different scales, so gains are relative to the initial interval. A name may say "held out" itself.
    names = {key: key.removeprefix(HELD_OUT).removesuffix("_held_out").replace("_", " ") for key in held_out[:3]}
    rewards = {PROXY: "trained on", **{key: f"held out: {name}" for key, name in names.items()}}
    gains = [Line(label, _gain(evaluations, key), color) for color, (key, label) in enumerate(rewards.items(), 1)]
    retained = [
        Line(key.removeprefix("eval_").replace("_", " "), [(step, value / points[0][1]) for step, value in points], at)
        for at, key in enumerate(TOLERANCE, 2)
        if (points := _points(evaluations, key)) and points[0][1] > 0
    ]
    divergence = [Line("", _points(evaluations, "eval_kl"), 4)]
    return _drawn(
        _alarmed("Reward gain, in units of the initial 95 % interval", gains if held_out else [], alarms),
        _alarmed("Fraction of the base model's score retained", retained, alarms, include=(0, 1)),
        _alarmed("KL from the base model", divergence, alarms),
    )


def stage_charts(found: Comparison) -> list[Chart]:
    """Memory and time of each stage, planned and measured."""

    def bars(measures: Sequence[Measure], unit: float = 1) -> list[Bars]:
        planned, measured = ([None if x is None else x / unit for x in row] for row in zip(*measures, strict=True))
        return [Bars("planned", planned, faint=True), Bars("measured", measured)]

    if not found.stages:
        return []
    names = [stage.name for stage in found.stages]
    return _drawn(
        bar_chart("Peak memory of a stage", names, bars([stage.memory for stage in found.stages], GIB), "GiB"),
        bar_chart("Time of a stage in a step", names, bars([one.seconds for one in found.stages]), "seconds", color=2),
    )


def _drawn(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _points(records: Sequence[Record], key: str) -> list[Point]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _smoothed(records: Sequence[Record], title: str, key: str, color: int = 1, spread: str = "") -> Chart | None:
    raw = _points(records, key)
    window = len(raw) // 10 | 1
    if window < 3:
        return line_chart(title, [Line("", raw, color)])
    mean = moving_average(raw, window)
    label, band = f"mean of {window} steps", None
    widths = moving_average(_points(records, spread), window)
    if len(widths) == len(mean):
        band = [(y - width, y + width) for (_, y), (_, width) in zip(mean, widths, strict=True)]
        label += " \N{PLUS-MINUS SIGN} standard deviation of a batch"
    return line_chart(title, [Line("", raw, color, faint=True), Line(label, mean, color, band=band)])


def _with_interval(evaluations: Sequence[Record], key: str, line: Line) -> Line:
    points, low, high = (_points(evaluations, f"{key}{end}") for end in ("", "_low", "_high"))
    complete = len(low) == len(high) == len(points)
    band = [(bottom, top) for (_, bottom), (_, top) in zip(low, high, strict=True)] if complete else None
    return replace(line, points=points, band=band)


def _kl_by_index(records: Sequence[Record]) -> Chart | None:
    """KL against the position in the denoising schedule, in three parts of the run."""
    measured = [record["kl_by_index"] for record in records if record.get("kl_by_index")]
    names = ("first third", "second third", "last third") if len(measured) >= 9 else ("whole run",)
    lines = []
    for part, name in enumerate(names):
        values: dict[int, list[float]] = {}
        for record in measured[len(measured) * part // len(names) : len(measured) * (part + 1) // len(names)]:
            for index, value in record.items():
                values.setdefault(int(index), []).append(value)
        means = [(index, sum(found) / len(found)) for index, found in sorted(values.items())]
        lines.append(Line(name, means, (3, 1, 4)[part]))
    return line_chart("KL by denoising index (0 = noisiest)", lines, x_label="index")


def _gain(evaluations: Sequence[Record], key: str) -> list[Point]:
    known = [record for record in evaluations if record.get(key) is not None]
    if not known or known[0].get(f"{key}_low") is None:
        return []
    width = known[0][f"{key}_high"] - known[0][f"{key}_low"]
    return [(record["step"], (record[key] - known[0][key]) / width) for record in known] if width else []


def _alarmed(
    title: str, lines: Sequence[Line], alarms: Sequence[Record], include: Sequence[float] = ()
) -> Chart | None:
    heights = [y for line in lines for _, y in line.points]
    if not heights:
        return None
    ends = [edge([*heights, *include]) for edge in (min, max)]
    marks = [
        Line(f"alarm at step {alarm['step']}", [(alarm["step"], end) for end in ends], 2, dashed=True)
        for alarm in alarms
    ]
    return line_chart(title, [*lines, *marks], include=include)
