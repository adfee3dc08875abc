from __future__ import annotations

import json

import gpu
import pytest
from gpu import Part, measure


def text(output, scratch):
    return {"text": output}


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_runs(tmp_path):
    output = tmp_path / "result.json"
    chosen = [
        Part("fails", ("-c", "raise SystemExit('no driver')"), 30, text),
        Part("hangs", ("-c", "print('so far', flush=True); import time; time.sleep(60)"), 3, text),
        Part("unreadable", ("-c", "print('no JSON')"), 30, gpu.machine),
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


@pytest.mark.slow
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
    found = gpu.outcomes(output, tmp_path)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failed"] == ["tests/a.py::test_four", "tests/a.py::test_two"]


def test_what_the_benchmarks_wrote_before_a_time_out_is_kept(tmp_path):
    found = gpu.benchmarks("Traceback", tmp_path)
    assert found == {"counts": {}, "failed": [], "text": ["Traceback"], "benchmarks": [], "targets": []}
    (tmp_path / "benchmarks.json").write_text(json.dumps({"benchmarks": [{"extra_info": {"size": "sd15"}}]}))
    found = gpu.benchmarks("bench/test_bench.py::test_bench[sd15] PASSED [ 10%]\ntraining step of sd15", tmp_path)
    assert found["benchmarks"] == [{"extra_info": {"size": "sd15"}}]
    assert found["counts"] == {"passed": 1}
    assert found["text"][1] == "training step of sd15"


def test_the_whole_run_stays_under_nine_minutes_and_measures_the_gpu():
    assert gpu.BUDGET <= 530
    parts = {part.name: part for part in gpu.parts(toy=False)}
    assert "--bench-device=cuda" in parts["benchmarks"].arguments
    assert "tests/kernels" in parts["tests"].arguments
    assert "tests/engine" in parts["tests"].arguments
    # Without a choice the models of true size, on CUDA.
    step = parts["training step"]
    assert {"--bench-device=cuda", "training_step"} <= set(step.arguments)
    assert not any("--bench-models" in argument for argument in step.arguments)
    # The fused ops get two minutes even when everything before them is stopped by its limit.
    assert sum(parts[name].limit for name in ("machine", "tests", "training step")) <= gpu.BUDGET - 120
    assert not any("--toy" in part.arguments for part in parts.values())


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path / "result.json")])
    assert ended.value.code == 2
    assert "no CUDA GPU here; --toy" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
