"""Recorded figures of a step, of sampling and of the optimizer are kept and shown on their pages."""

from __future__ import annotations

import json
import shutil

import pages
import plots
import pytest
import record
import torch
from cases.training_step import measure, prediction
from cases.training_step.problem import problem
from harness.tables import MARKS

PAGE = f"# Title\n\nbefore\n\n{MARKS[0]}\n\nold table\n\n{MARKS[1]}\n\nafter\n"


def step(implementation, **other):
    return {
        "op": "training_step",
        "implementation": implementation,
        "device": "cpu",
        "size": "shapes",
        "dtype": "float32",
        "batch": 4,
        "toy": False,
        "fault": None,
        "median_seconds": 0.5,
        "spread": 0.05,
        "flops": 20e9,
        "flops_per_second": 40e9,
        "utilisation": 0.8,
        "times_published": 1.25,
        "peak_bytes": 100 * 2**20,
        "predicted_bytes": 101 * 2**20,
        "training_step_of_joint": {"1": 1.05},
        **other,
    }


SAMPLING = {
    "op": "sampling",
    "implementation": "attention-scores",
    "device": "cpu",
    "size": "shapes",
    "dtype": "float32",
    "toy": False,
    "median_seconds": 0.25,
    "spread": 0.02,
    "times_eager": 1.1,
    "times_merged": 0.9,
    "operators": 1234,
}
OPTIMIZER = {
    "op": "adamw_8bit",
    "implementation": "native",
    "direction": "step",
    "device": "cpu",
    "size": "4M",
    "shape": [2**22],
    "dtype": "bfloat16",
    "toy": False,
    "median_seconds": 2e-3,
    "spread": 0.02,
    "gb_per_second": 12.5,
    "times_eager": None,
    "times_bitsandbytes": 4.0,
}


@pytest.fixture
def results(tmp_path, recorded):
    others = [step("published", predicted_bytes=None, utilisation=None), step("staged"), SAMPLING, OPTIMIZER]
    recorded["benchmarks"] += [{"extra_info": row} for row in others]
    return record.record(recorded, tmp_path / "results")


def test_every_benchmark_is_recorded_for_its_device(results):
    cpu, cuda = (json.loads(path.read_text()) for path in results)
    assert [row["op"] for row in cpu["rows"][-4:]] == ["training_step", "training_step", "sampling", "adamw_8bit"]
    assert {row["op"] for row in cuda["rows"]} == {row["op"] for row in cpu["rows"][:-4]}
    assert {row["op"] for row in cpu["rows"][:-4]} == {"denoise_step", "posterior_mean"}
    texts = [target["text"] for target in cpu["targets"]]
    assert "peak of staged on shapes: predicted +1.0%, at most 2% off, met" in texts
    assert (
        "AdamW step with 8-bit states, 4,194,304 bfloat16 parameters, native: 4.00 x bitsandbytes, at least 3, met"
        in (texts)
    )


def test_steps_measured_on_a_gpu_are_kept(tmp_path, recorded):
    run = {**recorded, "benchmarks": [{"extra_info": step("staged", device="cuda")}]}
    found = {"parts": {"machine": {"result": {}}, "training step": {"status": "ok", "result": run}}}
    (path,) = record.record(found, tmp_path / "filed")
    assert [row["implementation"] for row in json.loads(path.read_text())["rows"]] == ["staged"]


def test_each_page_shows_its_own_rows_and_keeps_its_text(results, tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("benchmarks.md", "training_step.md", "sampling.md", "optimizers.md"):
        (docs / name).write_text(PAGE)
    monkeypatch.setattr(plots, "draw", lambda result, name, folder: [])
    pages.main([*map(str, results), "--docs", str(docs)])
    steps, sampling, optimizer = ((docs / f"{n}.md").read_text() for n in ("training_step", "sampling", "optimizers"))
    for text in (steps, sampling, optimizer):
        assert text.startswith("# Title\n\nbefore\n")
        assert text.endswith("\nafter\n")
        assert "old table" not in text
        assert "### Some CPU (R) 9, 2 cores\n\n2 threads, native library: AVX2, ABI 2, " in text
        assert "torch 2.13.0, Triton 3.7.1, Python 3.11.7, commit 0123456789ab, 2026-01-02." in text
    assert (
        "| staged | - | 500.00 ms | 5% | 1.25 | 20.0 | - | 40.0 | 80% | 1.050 | - | 100.0 MiB | - | 101.0 MiB |"
        in steps
    )
    assert "| published | - | 500.00 ms | 5% | 1.25 | 20.0 | - | 40.0 | - | 1.050 | - | 100.0 MiB | - | - |" in steps
    assert "- peak of staged on shapes: predicted +1.0%, at most 2% off, met" in steps
    assert "| attention-scores | float32 | 250.00 ms | 2% | 1.10 | 0.90 | 1,234 |" in sampling
    assert "| native | step | bfloat16 | 2.00 ms | 2% | 12.5 | - | 4.00 |" in optimizer


def test_pages_without_marks_are_left_alone_and_nothing_recorded_is_said(tmp_path):
    (tmp_path / "training_step.md").write_text(PAGE)
    (tmp_path / "sampling.md").write_text("no marks\n")
    assert pages.write_pages({"cpu": {"device": "cpu", "rows": []}}, tmp_path, {}) == [tmp_path / "training_step.md"]
    assert "Nothing has been recorded yet." in (tmp_path / "training_step.md").read_text()
    assert (tmp_path / "sampling.md").read_text() == "no marks\n"


def test_the_pages_of_docs_are_those_of_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        plots, "draw", lambda result, name, folder: sorted((pages.DOCS / "images").glob(f"bench_{name}_*"))
    )
    names = ("benchmarks.md", "training_step.md", "sampling.md", "optimizers.md")
    for name in names:
        shutil.copy(pages.DOCS / name, tmp_path / name)
    pages.main(["--docs", str(tmp_path)])
    for name in names:
        assert (tmp_path / name).read_text() == (pages.DOCS / name).read_text()


def test_a_cpu_is_held_to_its_fastest_matrix_product(monkeypatch):
    ticks = iter([0.0, 2.0, 2.0, 3.0, *([3.0, 5.0] * 8)])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    assert measure.product_flops.__wrapped__(torch.float32, True) == 2 * 64**3 / 1.0
    monkeypatch.setattr(prediction, "peak_flops", lambda given: 7.0)
    assert measure.best_flops(problem("sd15", "cuda")) == 7.0
