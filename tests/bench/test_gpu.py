from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from training_step.cases import SUBJECTS

ROOT = Path(__file__).parents[2]
GPU = runpy.run_path(str(ROOT / "bench" / "gpu" / "__main__.py"))
Part, measure = GPU["Part"], GPU["measure"]


def text(output, scratch):
    return {"text": output}


def test_the_toy_run_writes_one_file_with_everything(tmp_path):
    output = tmp_path / "toy.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu"), "--toy", "--output", str(output)]
    # Toy sizes gain nothing from threads, and lose minutes to them where the machine is busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr + output.read_text()
    result = json.loads(output.read_text())
    assert result["toy"] is True
    assert result["left_out"] == []
    # none where the checkout is no repository
    assert result["commit"] is None or len(result["commit"].removesuffix("+changes")) == 40
    assert [part["status"] for part in result["parts"].values()] == ["ok"] * 4
    assert sum(part["seconds"] for part in result["parts"].values()) <= result["seconds"] + 0.5
    machine, tests, benchmarks = (result["parts"][name]["result"] for name in ("machine", "tests", "benchmarks"))
    assert {"gpu", "driver", "cuda", "torch", "triton"} <= set(machine)
    assert set(tests["counts"]) == {"passed"}
    assert tests["failed"] == []
    rows = [(row["op"], row["size"], row["direction"], row["implementation"]) for row in benchmarks["rows"]]
    assert rows == [
        ("posterior_mean", "sd15", direction, implementation)
        for direction in ("forward", "backward", "both")
        for implementation in ("eager", "compile", "native")
    ]
    assert len(benchmarks["targets"]) == 11  # of which toy sizes answer none of denoise_step
    assert benchmarks["counts"] == {"passed": 9}
    steps = result["parts"]["training step"]["result"]
    assert [row["implementation"] for row in steps["rows"]] == list(SUBJECTS)
    for row in steps["rows"][1:]:
        assert row["fault"] is None
        assert list(row["predicted_stage_bytes"]) == list(row["stage_bytes"])
        assert row["predicted_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)
    assert steps["text"][0] == "training step of shapes, batch 2, float32, cpu, toy sizes: no figure means anything"


def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_runs(tmp_path):
    output = tmp_path / "result.json"
    chosen = [
        Part("fails", ("-c", "raise SystemExit('no driver')"), 30, text),
        Part("hangs", ("-c", "print('so far', flush=True); import time; time.sleep(60)"), 3, text),
        Part("unreadable", ("-c", "print('no JSON')"), 30, GPU["machine"]),
        Part("works", ("-c", "print(6 * 7)"), 30, text),
    ]
    assert measure(chosen, 200.0, output, toy=True) == 1
    parts = json.loads(output.read_text())["parts"]
    assert parts["fails"]["status"] == "failed"
    assert "no driver" in parts["fails"]["output_end"]
    assert parts["hangs"]["status"] == "timed out"
    assert parts["hangs"]["result"]["text"].startswith("so far")
    assert parts["unreadable"]["status"] == "failed"
    assert "JSONDecodeError" in parts["unreadable"]["error"]
    assert parts["works"] == {
        "status": "ok",
        "exit_code": 0,
        "result": {"text": "42\n"},
        "seconds": parts["works"]["seconds"],
    }


def test_what_no_longer_fits_is_left_out_and_named(tmp_path, capsys):
    output = tmp_path / "result.json"
    chosen = [Part("first", ("-c", "import time; time.sleep(60)"), 60, text), Part("second", ("-c", ""), 60, text)]
    assert measure(chosen, 12.0, output, toy=False) == 1
    result = json.loads(output.read_text())
    assert result["parts"]["first"]["status"] == "timed out"
    assert result["left_out"] == ["second"]
    assert "second: left out" in capsys.readouterr().out


def test_outcomes_are_read_from_whatever_pytest_has_printed(tmp_path):
    output = (
        "tests/a.py::test_one[x y] PASSED [ 10%]\n"
        "tests/a.py::test_two FAILED [ 20%]\n"
        "tests/a.py::test_three SKIPPED (no GPU) [ 30%]\n"
        "tests/a.py::test_four ERROR\n"
        "tests/a.py::test_five \n"
        "FAILED tests/a.py::test_two - assert 1 == 2\n"
    )
    found = GPU["outcomes"](output, tmp_path)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failed"] == ["tests/a.py::test_four", "tests/a.py::test_two"]


def test_benchmarks_that_wrote_nothing_have_no_rows(tmp_path):
    assert GPU["benchmarks"]("", tmp_path) == {"counts": {}, "failed": [], "rows": [], "targets": []}


def test_the_steps_measured_before_a_time_out_are_kept(tmp_path):
    assert GPU["training_steps"]("Traceback", tmp_path) == {"rows": [], "text": []}
    (tmp_path / "steps.json").write_text(json.dumps({"rows": [{"size": "sd15"}]}))
    found = GPU["training_steps"]("a warning\ntraining step of sd15, batch 4\nway  time\n", tmp_path)
    assert found == {"rows": [{"size": "sd15"}], "text": ["training step of sd15, batch 4", "way  time"]}


def test_the_whole_run_stays_under_nine_minutes_and_measures_the_gpu():
    assert GPU["BUDGET"] <= 530
    parts = {part.name: part for part in GPU["parts"](toy=False)}
    assert "--bench-device=cuda" in parts["benchmarks"].arguments
    assert "tests/kernels" in parts["tests"].arguments
    assert "tests/engine" in parts["tests"].arguments
    step = parts["training step"]
    assert {"--device=cuda", "sd15", "sdxl"} <= set(step.arguments)
    # The fused ops get two minutes even when everything before them is stopped by its limit.
    assert sum(parts[name].limit for name in ("machine", "tests", "training step")) <= GPU["BUDGET"] - 120
    assert not any("--toy" in part.arguments for part in parts.values())


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        GPU["main"](["--output", str(tmp_path / "result.json")])
    assert ended.value.code == 2
    assert "no CUDA GPU here; --toy" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
