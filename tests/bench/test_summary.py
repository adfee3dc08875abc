from __future__ import annotations

from functools import partial

import pytest
import registry
import torch
from cases import ops
from harness import benchmark
from harness.benchmark import Benchmark, Group, Prepared, measure, noise
from harness.tables import as_lines, table
from harness.timing import Pace, Subject

from sqdf_fast.kernels.spec import Problem

PROBLEM = Problem("denoise_step", "sd15", (8, 4, 64, 64), torch.float32, "cpu", "given")
SAMPLES = {
    "eager": [6e-3, 8e-3, 9e-3],
    "compile": [3e-3, 3e-3, 5e-3],
    "native": [1e-3, 2e-3, 9e-3],
    "copy": [1e-3, 1e-3, 7e-3],
}


@pytest.fixture
def measured(monkeypatch):
    """A group of a problem with the samples and peaks chosen by hand."""
    monkeypatch.setattr(benchmark, "peak_bytes", lambda subject, device: subject.call(None))

    def measured(samples, problem=PROBLEM, direction="both", faults=None):
        monkeypatch.setattr(benchmark, "interleave", lambda subjects, device, pace: samples)
        peaks = {"eager": 30, "compile": 20, "native": 10}
        subjects = {name: Subject(lambda _, peak=peak: peak) for name, peak in peaks.items()}
        figures = partial(ops.figures, problem, direction)
        prepared = Prepared(subjects, faults or {}, Pace(0.0, 1), figures)
        fields = {"device": "cpu", "size": problem.size, "dtype": "float32", "noise": "given", "direction": direction}
        group = Group("", tuple(peaks), fields, problem)
        entry = Benchmark(problem.op, "", lambda choice: [group], lambda group, toy: prepared, (), lambda rows: [])
        return measure(entry, group, toy=False)

    return measured


def rows(recorded):
    return [benchmark["extra_info"] for benchmark in recorded["benchmarks"]]


def test_figures_of_a_row_are_of_medians(measured):
    row = measured(SAMPLES).rows["native"]
    moved = 13 * 8 * 4 * 64 * 64 * 4
    assert row["median_seconds"] == 2e-3
    assert row["bytes_moved"] == moved
    assert row["gb_per_second"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["copy_gb_per_second"] == pytest.approx(moved / 1e-3 / 1e9)
    assert row["copy_fraction"] == pytest.approx(0.5)
    assert row["times_eager"] == pytest.approx(4.0)
    assert row["times_compile"] == pytest.approx(1.5)
    assert row["peak_bytes"] == 10
    assert row["spread"] == pytest.approx((9e-3 - 1e-3) / 2e-3)


def test_no_ratio_to_a_baseline_that_has_no_number(measured):
    samples = {name: taken for name, taken in SAMPLES.items() if name != "compile"}
    found = measured(samples, faults={"compile": "wrong"})
    row = found.rows["native"]
    assert row["times_compile"] is None
    assert row["times_eager"] == pytest.approx(4.0)
    assert table(ops.COLUMNS, [row]).rows[0][-4] == "-"
    assert found.rows["compile"]["fault"] == "wrong"
    # Samples are pytest-benchmark's; the copy is no contender.
    assert set(found.samples) == {"eager", "native"}
    assert "samples" not in row


def test_an_op_that_streams_nothing_has_no_bandwidth(measured):
    problem = Problem("discounted_loss", "batch64", (64,), torch.float32, "cpu", "")
    samples = {name: taken for name, taken in SAMPLES.items() if name != "copy"}
    row = measured(samples, problem, "forward").rows["native"]
    assert row["gb_per_second"] is row["copy_fraction"] is None


def test_verdicts_say_met_not_met_and_not_measured(recorded):
    found = dict(registry.verdicts(rows(recorded)))
    start = "denoise_step forward + backward, "
    assert found[f"{start}sd15 float32, noise given, native: 4.00 x eager, at least 3, met"]
    assert found[f"{start}sdxl float32, noise drawn, native: 4.00 x eager, at least 3, met"]
    assert found[f"{start}video float32, noise given, native: 1.50 x torch.compile, at least 1.2, met"]
    assert found[f"{start}beyond-cache float32, noise given, native: 0.88 of the copy bandwidth, at least 0.7, met"]
    assert not found[f"{start}sd15 bfloat16, noise given, triton: 4.00 x eager, at least 5, NOT MET"]
    assert not found[
        f"{start}beyond-cache float32, noise drawn, triton: 0.88 of the copy bandwidth, at least 0.9, NOT MET"
    ]
    missing = [row for row in rows(recorded) if (row["implementation"], row["size"]) != ("native", "video")]
    found = dict(registry.verdicts(missing))
    assert not found[f"{start}video float32, noise given, native: x eager at least 3, NOT MEASURED"]


def test_every_target_of_a_measured_device_is_answered_and_no_other(recorded):
    cpu = [row for row in rows(recorded) if row["device"] == "cpu"]
    assert len(registry.verdicts(cpu)) == 3 + 3 + 1 + 3 + 1
    assert len(registry.verdicts(rows(recorded))) == 11 + 12
    assert registry.verdicts([]) == []


def test_the_table_names_what_repeats_once(recorded):
    lines = as_lines(table(ops.COLUMNS, rows(recorded)[:4]))
    assert lines[0].split() == [
        *("size", "dtype", "noise", "direction", "implementation", "time", "spread"),
        *("x", "eager", "x", "compile", "GB/s", "of", "copy", "peak"),
    ]
    assert " ".join(lines[1].split()) == "sd15 float32 given forward eager 8.00 ms 5% - 0.38 0.9 1% 3.0 MiB"
    assert " ".join(lines[3].split()) == "native 2.00 ms 5% 4.00 1.50 3.5 4% 3.0 MiB"
    assert lines[4].split()[:4] == ["sd15", "float32", "given", "backward"]


def test_noise_counts_the_rows_that_jump():
    text = noise([{"spread": 0.01}, {"spread": 0.05}, {"spread": 0.5}])
    assert "5% in the middle, above 20% in 1 of 3 rows" in text
