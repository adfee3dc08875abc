from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from sqdf_fast.runs import read_run, summary_lines, write_report
from sqdf_fast.runs.comparison import GIB, Measure, StageFigures, compare, read_plan

PLAN = {
    "fits": True,
    "peak_gib": 4.0,
    "reserve_gib": 1.0,
    "executor": "staged",
    "micro_batch": 2,
    "settings": {"execution.decode_images": 4},
    "stages": [
        {"name": "transition", "live_gib": 2.0, "tflop": 3.0, "seconds": 1.0, "note": ""},
        {"name": "reward", "live_gib": 4.0, "tflop": 9.0, "seconds": 3.0, "note": "decoder <recomputed>"},
    ],
    "flops_per_step": 12e12,
    "predicted_seconds": 4.0,
}


def step(number: int, stages: list | None = None, **more) -> dict:
    found = {"kind": "step", "step": number, "reward_mean": 0.1, "seconds": 5.0, "memory_bytes": int(4.2 * GIB)}
    return found | ({"stages": stages} if stages else {}) | more


STEPS = [
    step(1, [["transition", 2 * GIB, 9.0], ["reward", 3 * GIB, 30.0]], seconds=8.0, joules=900.0),
    step(2, budget_event="out of memory in stage reward: decode_images 4 -> 2"),
    step(3, [["transition", GIB, 1.25], ["reward", 5 * GIB, 2.0], ["optimizer", GIB, 0.5]], joules=2100.0),
    step(4, [["transition", GIB, 1.0], ["reward", 3 * GIB, 2.0]], seconds=2.0),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run of four steps on a GPU, with its plan."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "m", "reward": "r", "steps": 4, "device": "auto"}))
    (tmp_path / "environment.json").write_text(json.dumps({"GPU": "Card"}))
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    write_steps(tmp_path, STEPS)
    return tmp_path


def write_steps(folder: Path, steps: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))


class Section(HTMLParser):
    """Rows, tiles, remarks, events and drawings of the section; the whole page must nest."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tiles: list[str] = []
        self.remarks: list[str] = []
        self.events: list[str] = []
        self.charts: list[str] = []
        self.heading, self._inside, self._open = "", False, list[str]()
        self.feed(write_report(folder).read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        if tag == "h2":
            self._inside = False
        if self._inside and tag in ("tr", "b", "p", "li", "figcaption"):
            kind = {"tr": self.rows, "b": self.tiles, "p": self.remarks, "li": self.events, "figcaption": self.charts}
            kind[tag].append([] if tag == "tr" else "")
        if self._inside and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        tag = self._open[-1] if self._open else ""
        if tag == "h2" and data.startswith("Memory and time"):
            self.heading, self._inside = data, True
        elif self._inside and tag in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._inside and tag in ("b", "span") and "figure" not in self._open:
            self.tiles[-1] += ("; " if tag == "span" else "") + data
        elif self._inside and tag in ("p", "li", "figcaption"):
            {"p": self.remarks, "li": self.events, "figcaption": self.charts}[tag][-1] += data


def test_stages_are_matched_by_name_with_largest_peak_and_median_time():
    found = compare(PLAN, STEPS, on_gpu=True)
    assert found.stages == [
        StageFigures("transition", Measure(2 * GIB, 2 * GIB), Measure(1.0, 1.25)),
        StageFigures("reward", Measure(4 * GIB, 5 * GIB), Measure(3.0, 2.0), "decoder <recomputed>"),
        StageFigures("optimizer", Measure(None, GIB), Measure(None, 0.5)),
    ]
    assert (found.peak, found.seconds) == (Measure(4 * GIB, 5 * GIB), Measure(4.0, 5.0))
    assert (found.reserve, found.joules) == (GIB, 1500.0)
    assert found.events == [(2, "out of memory in stage reward: decode_images 4 -> 2")]
    assert found.measured_steps == 3


def test_on_a_gpu_the_runs_peak_counts_and_on_a_cpu_it_is_another_figure():
    steps = [step(1, memory_bytes=9 * GIB)]
    assert compare(PLAN, steps, on_gpu=True).peak.measured == 9 * GIB
    assert compare(PLAN, steps, on_gpu=False).peak.measured is None
    counted = [step(1, [["reward", 2 * GIB, 1.0]], memory_bytes=9 * GIB)]
    assert compare(PLAN, counted, on_gpu=False).peak.measured == 2 * GIB


def test_of_the_sampling_a_step_has_its_share(folder):
    config = {"steps": 16, "replay": {"steps_per_refill": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sampled = [["sampling", GIB, 40.0], ["reward", GIB, 2.0]]
    write_steps(folder, [step(1, sampled), step(2, [["reward", GIB, 2.0]]), step(9, sampled)])
    stages = {stage.name: stage.seconds.measured for stage in read_run(folder).comparison.stages}
    assert stages == {"transition": None, "reward": 2.0, "sampling": 5.0}


@pytest.mark.parametrize(
    ("planned", "measured", "text"),
    [(4.0, 5.0, "+25.0%"), (4.0, 3.9, "-2.5%"), (4.0, 4.0, "+0.0%"), (None, 5.0, ""), (4.0, None, ""), (0.0, 1.0, "")],
)
def test_difference(planned, measured, text):
    assert Measure(planned, measured).difference == text


@pytest.mark.parametrize("content", [None, "{cut", "[1]", "null"])
def test_a_plan_that_cannot_be_read_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    assert read_plan(tmp_path) == {}


def test_the_section_has_a_line_a_stage_and_the_total(folder):
    section = Section(folder)
    assert section.heading == "Memory and time against the plan"
    memory, time = ["memory planned", "memory measured"], ["time planned", "time measured"]
    assert section.rows == [
        ["stage", *memory, "difference", *time, "difference", "note"],
        ["transition", "2.00 GiB", "2.00 GiB", "+0.0%", "1 s", "1.25 s", "+25.0%", ""],
        ["reward", "4.00 GiB", "5.00 GiB", "+25.0%", "3 s", "2 s", "\u221233.3%", "decoder <recomputed>"],
        ["optimizer", "\u2013", "1.00 GiB", "\u2013", "\u2013", "0.5 s", "\u2013", ""],
        ["whole step", "4.00 GiB", "5.00 GiB", "+25.0%", "4 s", "5 s", "+25.0%", ""],
    ]
    assert section.tiles == [
        "5.00 GiB; peak memory; planned 4.00 GiB (+25.0%)",
        "5 s; a step, sampling included; planned 4 s (+25.0%)",
        "1.5 kJ; a step, the whole GPU",
    ]
    assert section.remarks == [
        "Planned before the run: staged executor, micro-batch 2, 1.00 GiB kept in reserve. "
        "Stages were measured in 3 steps: their largest peak and their median time."
    ]
    assert section.events == ["Step 2: out of memory in stage reward: decode_images 4 -> 2"]
    assert section.charts == ["Peak memory of a stage", "Time of a stage in a step"]


@pytest.mark.parametrize(("peak", "bad"), [(4.9, False), (5.1, True)])
def test_a_peak_beyond_plan_and_reserve_is_marked(folder, peak, bad):
    write_steps(folder, [step(1, memory_bytes=int(peak * GIB))])
    assert ('<div class="tile bad"><b>5.10 GiB' in write_report(folder).read_text(encoding="utf-8")) == bad


def test_a_plan_without_measurements_says_what_is_missing(folder):
    write_steps(folder, [])
    section = Section(folder)
    assert section.rows[0] == ["stage", "memory planned", "time planned", "note"]
    assert section.rows[-1] == ["whole step", "4.00 GiB", "4 s", ""]
    assert section.tiles == ["4.00 GiB; peak memory, planned", "4 s; a step, planned"]
    assert section.remarks[-1] == (
        "No step was measured stage by stage. The peak was not measured. Energy was not measured."
    )


def test_measurements_without_a_plan_say_so(folder):
    (folder / "plan.json").unlink()
    section = Section(folder)
    assert section.heading == "Memory and time of the stages"
    assert section.rows[0] == ["stage", "memory measured", "time measured"]
    assert section.rows[1] == ["transition", "2.00 GiB", "1.25 s"]
    assert section.tiles[0] == "5.00 GiB; peak memory"
    assert section.remarks[-1] == "The run has no readable plan (plan.json), so nothing is compared."


def test_on_a_cpu_times_are_compared_and_memory_is_not(folder):
    (folder / "environment.json").write_text("{}")
    write_steps(folder, [step(1, [["transition", None, 2.0], ["reward", None, 3.0]])])
    section = Section(folder)
    assert section.rows[1] == ["transition", "2.00 GiB", "1 s", "2 s", "+100.0%", ""]
    assert section.remarks[-1] == "Memory of the stages and energy are measured on a GPU only."


def test_a_plan_that_did_not_fit_is_not_hidden(folder):
    (folder / "plan.json").write_text(json.dumps(PLAN | {"fits": False}))
    assert "The plan predicted that the run would not fit." in Section(folder).remarks[0]


def test_a_run_without_plan_and_stages_has_no_section(folder):
    (folder / "plan.json").unlink()
    write_steps(folder, [step(1), step(2)])
    assert Section(folder).heading == ""


def test_the_summary_sets_the_peak_against_the_plan(folder):
    assert "peak memory  5.00 GiB of 4.00 GiB planned  (+25.0%)" in summary_lines(read_run(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": 4, "device": "cpu"}))
    write_steps(folder, [step(1)])
    assert not any("planned" in line for line in summary_lines(read_run(folder)))
