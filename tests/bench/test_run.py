"""The benchmarks as one starts them, in tiny sizes and a process of their own."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WRONG = """
def pytest_configure():
    from fused_ops import setups

    right = setups.philox_normal
    setups.philox_normal = lambda *given, impl: right(*given, impl=impl) * (1 + (impl == "native") * 1e-4)
"""


def run(output, *arguments, plugins=""):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--toy", "--bench-device=cpu"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={output}", *arguments]
    path = os.pathsep.join(filter(None, [str(plugins), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    found = run(output, "-k", "sd15 and forward and (noise_given or philox)")
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout, output.read_text()


def test_a_selection_runs_with_all_implementations(smoke):
    output, text = smoke
    rows = [benchmark["extra_info"] for benchmark in json.loads(text)["benchmarks"]]
    assert [(row["op"], row["implementation"]) for row in rows] == [
        *(("denoise_step", name) for name in ("eager", "compile", "native")),
        *(("philox", name) for name in ("eager", "native")),
    ]
    assert {row["toy"] for row in rows} == {True}
    assert rows[0]["bytes_moved"] == 8 * 512 * 4
    assert "denoise_step on cpu: eager, compile, native; no triton" in output
    assert "denoise_step on cpu, medians" in output
    assert "targets" not in output


def test_the_file_agrees_with_what_pytest_benchmark_computed(smoke):
    _, text = smoke
    for benchmark in json.loads(text)["benchmarks"]:
        assert set(benchmark["stats"]) == {"min", "max", "median", "iqr", "rounds"}
        assert benchmark["stats"]["median"] == pytest.approx(benchmark["extra_info"]["median_seconds"], rel=1e-6)


def test_the_file_does_not_tell_which_machine_it_was(smoke):
    _, text = smoke
    recorded = json.loads(text)
    assert set(recorded["commit_info"]) == {"id", "dirty"}
    assert "node" not in recorded["machine_info"]
    for secret in (platform.node(), platform.release(), str(ROOT), str(Path.home()), sys.prefix):
        assert secret not in text
    assert f'"{getpass.getuser()}"' not in text


def test_a_wrong_implementation_fails_and_gets_no_number(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    output = tmp_path / "bench.json"
    found = run(output, "-k", "philox and sdxl", "-p", "wrong", plugins=tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "no parity, no number: noise: relative error 1.00e-04" in found.stdout
    rows = [benchmark["extra_info"] for benchmark in json.loads(output.read_text())["benchmarks"]]
    assert [row["implementation"] for row in rows] == ["eager"]
    table = found.stdout.split("philox on cpu, medians")[1].split("short test summary")[0]
    assert "eager" in table
    assert "native" not in table
