from __future__ import annotations

import json

import pages
import plots
import pytest
import record
from harness.tables import MARKS
from PIL import Image

PAGE = f"# Title\n\nbefore\n\n{MARKS[0]}\n\nold table\n\n{MARKS[1]}\n\nafter\n"


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "benchmarks.md").write_text(PAGE)
    return folder


@pytest.fixture
def results(tmp_path, recorded):
    return record.record(recorded, tmp_path / "results")


def test_one_file_a_device_with_its_own_rows_and_targets(results):
    assert [path.name for path in results] == ["cpu-some-cpu-r-9-2-cores.json", "some-gpu-80gb.json"]
    cpu, cuda = (json.loads(path.read_text()) for path in results)
    assert {row["device"] for row in cpu["rows"]} == {"cpu"}
    assert len(cuda["rows"]) == 2 * len(cpu["rows"]) == 2 * 3 * 4 * 3 * 3
    assert [target["met"] for target in cpu["targets"]] == [True] * 11
    assert [target["met"] for target in cuda["targets"]].count(False) == 8
    assert "data" not in cpu["rows"][0]


def test_what_bench_gpu_wrote_is_filed_alike(tmp_path, recorded, results):
    own = [benchmark for benchmark in recorded["benchmarks"] if benchmark["extra_info"]["device"] == "cuda"]
    run = {**recorded, "counts": {}, "benchmarks": own, "commit_info": {"id": "0123456789abcdef", "dirty": True}}
    found = {
        "parts": {
            "machine": {"status": "ok", "result": recorded["machine_info"]},
            "tests": {"status": "timed out"},
            "training step": {"status": "failed", "result": {"benchmarks": []}},
            "benchmarks": {"status": "ok", "result": run},
        },
    }
    (path,) = record.record(found, tmp_path / "filed")
    filed, expected = json.loads(path.read_text()), json.loads(results[1].read_text())
    assert filed.pop("commit") == {"id": "0123456789abcdef", "dirty": True}
    assert filed == {name: value for name, value in expected.items() if name != "commit"}


def test_toy_figures_and_empty_runs_are_not_filed(tmp_path, recorded, command, capsys):
    recorded["benchmarks"][3]["extra_info"]["toy"] = True
    file = tmp_path / "run.json"
    for content in (recorded, {**recorded, "benchmarks": []}, {"parts": {}}):
        file.write_text(json.dumps(content))
        assert command("record", str(file), "--results", str(tmp_path / "results")) == 2
        assert capsys.readouterr().err.startswith("error: this run has no figures worth keeping")
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_plots_are_drawn_and_linked(results, docs, command):
    assert command("pages", *map(str, results), "--docs", str(docs)) == 0
    names = sorted(path.name for path in (docs / "images").iterdir())
    assert names == [
        "bench_cpu-some-cpu-r-9-2-cores_bandwidth.png",
        "bench_cpu-some-cpu-r-9-2-cores_time_float32.png",
        "bench_some-gpu-80gb_bandwidth.png",
        "bench_some-gpu-80gb_time_bfloat16.png",
        "bench_some-gpu-80gb_time_float32.png",
    ]
    page = (docs / "benchmarks.md").read_text()
    for name in names:
        with Image.open(docs / "images" / name) as image:
            assert image.width >= 1200
            colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
        # The light ground, and the lines or bars of torch.compile and ours.
        assert {(255, 255, 255), (0xE0, 0x8A, 0x1E), (0x1F, 0x6F, 0xB4)} <= colors
        assert f"(images/{name})" in page


@pytest.fixture
def undrawn(monkeypatch):
    """The page without the time that plots take."""
    monkeypatch.setattr(plots, "draw", lambda result, name, folder: [])


@pytest.mark.usefixtures("undrawn")
def test_the_page_keeps_its_text_and_gets_the_recorded_figures(results, docs):
    pages.main([*map(str, results), "--docs", str(docs)])
    page = (docs / "benchmarks.md").read_text()
    assert page.startswith(f"# Title\n\nbefore\n\n{MARKS[0]}\n")
    assert page.endswith(f"{MARKS[1]}\n\nafter\n")
    assert "old table" not in page
    assert (
        "| sd15 | given | both | 8.00 ms | 3.00 ms | 2.00 ms | 4.00 | 1.50 | 3.5 | 4% | 3.0 / 3.0 / 3.0 MiB |" in page
    )
    assert "### Some CPU (R) 9, 2 cores" in page
    assert "79.2 GiB, driver 1.2.3, CUDA 13.0, torch 2.13.0" in page
    assert "commit 0123456789ab, 2026-01-02." in page
    assert "triton: 4.00 x eager, at least 5, NOT MET" in page
    assert "No result of a GPU" not in page


@pytest.mark.usefixtures("undrawn")
def test_under_the_targets_stands_what_they_are_worth(results, docs):
    """How busy the machine was and, for a CPU, how far beyond its cache the largest size is."""
    pages.main([*map(str, results), "--docs", str(docs)])
    cpu, cuda = (docs / "benchmarks.md").read_text().split("\n### ")[1:]
    for text in (cpu, cuda):
        assert "\n- spread (interquartile range over median): 5% in the middle, above 20% in 0 of " in text
    assert "\n- beyond-cache moves up to 175 MB a call, 5.2 times the last-level cache that this machine reports" in cpu
    assert "(L3 Unified, 34 MB;" in cpu
    assert "last-level" not in cuda


@pytest.mark.usefixtures("undrawn")
def test_a_machine_that_does_not_tell_its_caches_is_filed_all_the_same(tmp_path, recorded, docs):
    recorded["machine_info"] = {**recorded["machine_info"], "caches": {}}
    pages.main([str(record.record(recorded, tmp_path / "results")[0]), "--docs", str(docs)])
    assert "last-level" not in (docs / "benchmarks.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_without_a_recorded_gpu_the_page_says_so(results, docs):
    pages.main([str(results[0]), "--docs", str(docs)])
    assert "No result of a GPU has been recorded yet." in (docs / "benchmarks.md").read_text()
