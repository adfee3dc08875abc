"""The benchmarks as one starts them, in tiny sizes and processes of their own: one run that every test here reads."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import registry
from cases.training_step import measure, prediction
from cases.training_step.benchmark import COLUMNS
from cases.training_step.problem import PUBLISHED, WAYS, problem
from harness.tables import table

from sqdf_fast.errors import UserError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What `python bench gpu --toy` wrote."""
    folder = tmp_path_factory.mktemp("toy")
    command = [sys.executable, str(ROOT / "bench"), "gpu", "--toy", "--output", str(folder / "toy.json")]
    # Toy sizes gain nothing from threads, and lose minutes to them where the machine is busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr + (folder / "toy.json").read_text()
    return json.loads((folder / "toy.json").read_text())


@pytest.fixture(scope="module")
def results(toy):
    return {name: part["result"] for name, part in toy["parts"].items()}


@pytest.fixture(scope="module")
def ops(results):
    return [benchmark["extra_info"] for benchmark in results["benchmarks"]["benchmarks"]]


@pytest.fixture(scope="module")
def steps(results):
    rows = [benchmark["extra_info"] for benchmark in results["training step"]["benchmarks"]]
    return {row["implementation"]: row for row in rows}


def test_one_file_holds_everything(toy, results, ops, steps):
    assert toy["toy"] is True
    assert toy["left_out"] == []
    # None where the checkout is no repository.
    assert toy["commit"] is None or len(toy["commit"].removesuffix("+changes")) == 40
    assert [part["status"] for part in toy["parts"].values()] == ["ok"] * 4
    assert sum(part["seconds"] for part in toy["parts"].values()) <= toy["seconds"] + 0.5
    assert {"gpu", "driver", "cuda", "torch", "triton"} <= set(results["machine"])
    assert set(results["tests"]["counts"]) == {"passed"}
    assert results["tests"]["failed"] == []
    assert len(results["benchmarks"]["targets"]) == 11  # of which toy sizes answer none of denoise_step
    assert results["benchmarks"]["counts"] == {"passed": 14}
    assert results["training step"]["counts"] == {"passed": 5}
    assert list(steps) == list(WAYS)
    for row in list(steps.values())[1:]:
        assert row["fault"] is None
        assert list(row["predicted_stage_bytes"]) == list(row["stage_bytes"])
        assert row["predicted_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)


def test_a_selection_runs_with_all_implementations(results, ops):
    assert [(row["op"], row["size"], row["direction"], row["implementation"]) for row in ops] == [
        *(("denoise_step", "sd15", "forward", name) for name in ("eager", "compile", "native")),
        *(
            ("posterior_mean", "sd15", direction, name)
            for direction in ("forward", "backward", "both")
            for name in ("eager", "compile", "native")
        ),
        *(("philox", "sd15", "forward", name) for name in ("eager", "native")),
    ]
    assert {row["toy"] for row in ops} == {True}
    assert ops[0]["bytes_moved"] == 8 * 512 * 4
    text = "\n".join(results["benchmarks"]["text"])
    assert "denoise_step on cpu: eager, compile, native; no triton" in text
    assert "denoise_step on cpu, medians" in text
    assert "targets" not in text


def test_the_file_agrees_with_what_pytest_benchmark_computed(results):
    for name in ("benchmarks", "training step"):
        for benchmark in results[name]["benchmarks"]:
            assert set(benchmark["stats"]) == {"min", "max", "median", "iqr", "rounds"}
            assert benchmark["stats"]["median"] == pytest.approx(benchmark["extra_info"]["median_seconds"], rel=1e-6)


def test_what_is_recorded_does_not_tell_which_machine_it_was(results):
    for recorded in (results["benchmarks"], results["training step"]):
        assert set(recorded["commit_info"]) == {"id", "dirty"}
        assert "node" not in recorded["machine_info"]
        text = json.dumps({name: value for name, value in recorded.items() if name != "text"})
        for secret in (platform.node(), platform.release(), str(ROOT), str(Path.home()), sys.prefix):
            assert secret not in text
        assert f'"{getpass.getuser()}"' not in text


def test_every_way_is_measured_on_the_embedded_model(results, steps):
    output = "\n".join(results["training step"]["text"])
    assert all(row["toy"] and row["fault"] is None for row in steps.values())
    # Rows of one sample: policy and reference both halves, of which the policy's have a backward, and the look-ahead.
    assert steps["joint"]["flops"] < steps[PUBLISHED]["flops"] < steps["staged"]["flops"]
    assert steps["staged"]["flops"] < steps["staged + checkpointing"]["flops"]
    assert steps["staged + checkpointing"]["flops"] == steps["staged + checkpointing + offload"]["flops"]
    peaks = [steps[way]["peak_bytes"] for way in WAYS]
    assert peaks == sorted(peaks, reverse=True)
    assert steps[PUBLISHED]["resident_bytes"] > 2.5 * steps["joint"]["resident_bytes"]
    moving = steps["staged + checkpointing + offload"]
    assert list(moving["stage_bytes"]) == ["transition", "look-ahead", "reward", "look-ahead vjp", "policy vjp"]
    assert moving["stage_bytes"]["reward"] < steps["staged + checkpointing"]["stage_bytes"]["reward"] - 3e6
    assert steps["joint"]["training_step_of_joint"] == {"1": 1.0, "8": 1.0}
    assert steps["staged"]["training_step_of_joint"]["1"] < 1.2
    assert steps["staged"]["training_step_of_joint"]["8"] < 1.2
    assert "training step of shapes, batch 2, float32, cpu, toy sizes: no figure means anything" in output
    assert "prediction" not in output  # there is one for each of ours
    assert "NOT MET" not in output  # toy sizes have no verdict


def test_a_way_without_parity_has_no_figures(steps):
    def text(rows):
        lines = [line for _, lines in registry.report(rows) for line in lines]
        return "\n".join([*lines, *(verdict.text for verdict in registry.verdicts(rows))])

    rows = list(steps.values())
    assert "staged takes 1.0" in text(rows)
    assert "at most 1.2, met" in text(rows)
    faulted = [
        {name: row[name] for name in ("op", "implementation", "device", "size", "dtype", "batch", "toy")}
        | {"gradient_error": 0.5, "fault": "gradient: relative error 5e-01, budget 3e-06"}
        for row in rows
    ]
    found = text([*rows[:2], *faulted[2:]])
    assert "staged: no parity, no figures: gradient" in found
    assert "x the FLOPs" not in found
    last = next(line for line in found.splitlines() if line.startswith("staged + checkpointing + offload "))
    assert last.split()[5:] == ["5.0e-01"] + ["-"] * 12
    assert "GiB" not in text(faulted)


@pytest.mark.parametrize("kind", [UserError, NotImplementedError])
def test_a_problem_that_cannot_be_simulated_leaves_what_is_measured(monkeypatch, steps, kind):
    def fails(given, name):
        raise kind("not on the meta device\nmore")

    monkeypatch.setattr(prediction, "stage_bytes", fails)
    found, reason = measure.predicted(problem("shapes", "cpu"), "staged")
    expected = f"{kind.__name__}: ['not on the meta device']"
    assert (found, reason) == (None, expected)
    row = {**steps["staged"], "predicted_bytes": None, "predicted_stage_bytes": None, "unpredicted": reason}
    assert table(COLUMNS, [row]).rows[0][-1] == "-"
    assert f"prediction: not available ({expected})" in registry.report([row])[0][1]
