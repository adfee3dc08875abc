from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest

from sqdf_fast.display.plots import Chart
from sqdf_fast.runs.charts import evaluation_charts, monitor_charts, stage_charts, training_charts
from sqdf_fast.runs.comparison import GIB, compare
from sqdf_fast.runs.page import render_report
from sqdf_fast.runs.run import Run
from sqdf_fast.runs.samples import Samples

ALARM = {"kind": "alarm", "step": 20, "best_step": 10, "reason": "alignment <fell>", "judges": ["alignment"]}


def evaluations(**more: float | None) -> list[dict]:
    found = []
    for index in range(3):
        record = {"step": 10 * index, "eval_kl": 0.1 * index, "eval_alignment": 0.5 - 0.1 * index}
        for key, value in (("eval_proxy_reward", float(index)), ("eval_held_out_hps", 0.2 + 0.01 * index)):
            record |= {key: value, f"{key}_low": value - 0.05, f"{key}_high": value + 0.05}
        found.append(record | more)
    return found


def curves(chart: Chart) -> dict[str, list[tuple[float, float]]]:
    """Points of every line of more than one point, by its label or, without one, by its place."""
    lines = [line for axes in chart.figure.axes for line in axes.lines if len(line.get_xdata()) > 1]
    return {
        str(line.get_label()): [(float(x), pytest.approx(float(y))) for x, y in line.get_xydata()] for line in lines
    }


def page(action: str | None, found: list[dict], alarms: list[dict]) -> str:
    config = {"monitor": {"action": action}} if action else {}
    return render_report(Run(Path("run"), config, [], found, alarms, "steps", Samples([], [], {}), {}, {}))


@pytest.mark.parametrize(
    ("action", "consequence"),
    [
        ("warn", "The run continued;"),
        ("stop", "The run ended there."),
        ("restore", "its result holds the weights of step 10."),
    ],
)
def test_an_alarm_is_reported_and_drawn(action: str, consequence: str) -> None:
    html = page(action, evaluations(), [ALARM])
    assert "Alarm at step 20: alignment &lt;fell&gt;." in html
    assert consequence in unescape(html)
    # Rewards, shares of the base model's, KL; the alarm in each.
    charts = monitor_charts(evaluations(), [ALARM])
    assert [curves(chart)["alarm at step 20"] for chart in charts] == [
        [(20, 0), (20, 20)],
        [(20, 0), (20, 1)],
        [(20, 0), (20, 0.2)],
    ]
    assert html.count("alarm at step 20</text>") == 3


def test_gains_are_in_units_of_the_first_interval_and_shares_of_the_first_value() -> None:
    gains, retained, divergence = monitor_charts(evaluations(), [])
    assert gains.title == "Reward gain, in units of the initial 95 % interval"
    assert curves(gains) == {
        "trained on": [(0, 0), (10, 10), (20, 20)],
        "held out: hps": [(0, 0), (10, 0.1), (20, 0.2)],
    }
    assert retained.title == "Fraction of the base model's score retained"
    assert curves(retained) == {"alignment": [(0, 1), (10, 0.8), (20, 0.6)]}
    assert retained.axes.get_ylim()[0] == 0
    assert list(curves(divergence).values()) == [[(0, 0), (10, 0.1), (20, 0.2)]]
    html = page("warn", evaluations(), [])
    assert "No over-optimization detected." in html
    assert "alarm" not in html


def test_there_is_no_section_where_nothing_was_watched() -> None:
    silent = [{"step": step, "eval_proxy_reward": 1.0} for step in (0, 5)]
    for html in (
        page("warn", silent, []),
        page("off", evaluations(), []),
        page("warn", evaluations()[:1], []),
        page(None, evaluations(), []),
    ):
        assert "Over-optimization" not in html


def test_evaluations_are_drawn_with_their_intervals() -> None:
    found = [record | {"eval_true_reward": 2.0 * record["step"]} for record in evaluations()]
    rewards, alignment = evaluation_charts(found)
    assert rewards.title == "Proxy and true reward"
    assert curves(rewards) == {
        "proxy (trained on)": [(0, 0), (10, 1), (20, 2)],
        "true (never trained on)": [(0, 0), (10, 20), (20, 40)],
    }
    left, right = rewards.figure.axes
    (band,) = left.collections
    heights = [round(float(y), 6) for y in band.get_paths()[0].vertices[:, 1]]
    assert {-0.05, 0.05, 1.95, 2.05} <= set(heights)
    # Without an interval of its own no band.
    assert not right.collections
    assert curves(alignment) == {"own prompt": [(0, 0.5), (10, 0.4), (20, 0.3)]}
    assert [chart.title for chart in evaluation_charts(evaluations())] == ["Reward", "Alignment with the prompt"]


def test_steps_are_smoothed_over_a_tenth_of_the_run() -> None:
    steps = [
        {"step": step, "reward_mean": float(step), "reward_std": 2.0, "kl_by_index": {"0": 1.0, "3": float(step)}}
        for step in range(1, 31)
    ]
    reward, by_index = training_charts(steps)
    raw, mean = reward.axes.lines
    assert mean.get_label() == "mean of 3 steps \N{PLUS-MINUS SIGN} standard deviation of a batch"
    assert list(raw.get_ydata()) == [float(step) for step in range(1, 31)]
    assert list(mean.get_ydata()[:3]) == [1.5, 2, 3]
    vertices = {(float(x), round(float(y), 6)) for x, y in reward.axes.collections[0].get_paths()[0].vertices}
    assert {(2, 0.0), (2, 4.0), (30, 27.5), (30, 31.5)} <= vertices
    # The mean of steps 1 to 10, 11 to 20 and 21 to 30.
    assert curves(by_index) == {
        "first third": [(0, 1), (3, 5.5)],
        "second third": [(0, 1), (3, 15.5)],
        "last third": [(0, 1), (3, 25.5)],
    }
    assert [len(chart.axes.lines) - 3 for chart in training_charts(steps[:3])[:1]] == [1]


def test_stages_are_bars_of_plan_and_measurement() -> None:
    plan = {"stages": [{"name": "reward", "live_gib": 4.0, "seconds": 3.0}, {"name": "policy", "seconds": 1.0}]}
    steps = [{"step": 1, "stages": [["reward", 5 * GIB, 2.0], ["optimizer", GIB, 0.5]]}]
    memory, seconds = stage_charts(compare(plan, steps, on_gpu=True))
    shown = {
        chart.title: {bars.get_label(): [bar.get_width() for bar in bars] for bars in chart.axes.containers}
        for chart in (memory, seconds)
    }
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert shown == {
        "Peak memory of a stage": {"planned": [4, nan, nan], "measured": [5, nan, 1]},
        "Time of a stage in a step": {"planned": [3, 1, nan], "measured": [2, nan, 0.5]},
    }
    assert [label.get_text() for label in memory.axes.get_yticklabels()] == ["reward", "policy", "optimizer"]
