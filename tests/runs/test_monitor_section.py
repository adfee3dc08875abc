from __future__ import annotations

import re

import pytest

from sqdf_fast.runs.monitor_section import monitor_section

ALARM = {"kind": "alarm", "step": 20, "best_step": 10, "reason": "alignment <fell>", "judges": ["alignment"]}


def evaluations(**more: float | None) -> list[dict]:
    found = []
    for index in range(3):
        record = {"step": 10 * index, "eval_kl": 0.1 * index, "eval_alignment": 0.5 - 0.1 * index}
        for key, value in (("eval_proxy_reward", float(index)), ("eval_held_out_hps", 0.2 + 0.01 * index)):
            record |= {key: value, f"{key}_low": value - 0.05, f"{key}_high": value + 0.05}
        found.append(record | more)
    return found


@pytest.mark.parametrize(
    ("action", "consequence"),
    [
        ("warn", "The run went on"),
        ("stop", "The run ended there."),
        ("restore", "its result holds the weights of step 10."),
    ],
)
def test_an_alarm_is_told_and_drawn(action: str, consequence: str) -> None:
    html = monitor_section({"monitor": {"action": action}}, evaluations(), [ALARM])
    assert "Alarm at step 20: alignment &lt;fell&gt;." in html
    assert consequence in html
    # Rewards, shares of the base model's, KL; the alarm in each.
    assert html.count("<svg") == 3
    assert html.count("alarm at step 20</span>") == 3


def test_gains_are_in_widths_of_the_first_interval_and_shares_of_the_first_value() -> None:
    html = monitor_section({"monitor": {"action": "warn"}}, evaluations(), [])
    tips = re.findall(r"<title>(.*?)</title>", html)
    assert "trained on 10 at 10" in tips
    assert "held out: hps 0.2 at 20" in tips
    assert "alignment 0.6 at 20" in tips
    assert "saw no judge fall" in html
    assert "alarm" not in html


def test_there_is_no_section_where_nothing_was_watched() -> None:
    silent = [{"step": step, "eval_proxy_reward": 1.0} for step in (0, 5)]
    assert monitor_section({"monitor": {"action": "warn"}}, silent, []) == ""
    assert monitor_section({"monitor": {"action": "off"}}, evaluations(), []) == ""
    assert monitor_section({"monitor": {"action": "warn"}}, evaluations()[:1], []) == ""
    assert monitor_section({}, evaluations(), []) == ""
