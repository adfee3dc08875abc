"""The benchmarks of the fused ops: `pytest bench/ --benchmark-only`, see docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fused_ops import machine, summary
from fused_ops.cases import Case, absent, cases, devices, implementations
from fused_ops.measure import Measurements
from fused_ops.timing import play, playback_time

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.dispatch import IMPLEMENTATIONS

OPS = ("denoise_step", "posterior_mean", "discounted_loss", "philox")

_rows = pytest.StashKey[list[summary.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused ops")
    group.addoption("--toy", action="store_true", help="tiny sizes and few rounds: does it run, not how fast")
    group.addoption("--bench-device", default="all", metavar="DEVICE", help="all (default), cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    op = metafunc.module.OP
    metafunc.parametrize(
        "case", [_parameter(case) for case in cases(op, _devices(metafunc.config), _toy(metafunc.config))]
    )


def _parameter(case: Case) -> Any:
    group = f"{case.problem.op}-{case.row}"
    return pytest.param(case, id=case.id, marks=pytest.mark.benchmark(timer=playback_time, group=group))


def _devices(config: pytest.Config) -> list[str]:
    try:
        return devices(config.getoption("bench_device"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def _toy(config: pytest.Config) -> bool:
    toy: bool = config.getoption("toy")
    return toy


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = ["toy sizes: no figure below means anything"] if _toy(config) else []
    for device in _devices(config):
        for op in OPS:
            reasons = ((name, absent(op, name, device)) for name in IMPLEMENTATIONS)
            missing = "".join(f"; no {name}: {reason}" for name, reason in reasons if reason)
            lines.append(f"{op} on {device}: {', '.join(implementations(op, device))}{missing}")
    return lines


@pytest.fixture(scope="session")
def measurements(pytestconfig: pytest.Config) -> Measurements:
    return Measurements(_toy(pytestconfig))


@pytest.fixture
def report(benchmark: Any, measurements: Measurements, pytestconfig: pytest.Config) -> Callable[[Case], None]:
    """Measure a case and hand its samples to pytest-benchmark; without parity it fails and there is no number."""

    def measure(case: Case) -> None:
        measured = measurements.row(case)
        if case.implementation in measured.faults:
            pytest.fail(f"no parity, no number: {measured.faults[case.implementation]}", pytrace=False)
        samples = measured.samples[case.implementation]
        row = summary.row(case, measured, _toy(pytestconfig))
        benchmark.extra_info.update(row)
        benchmark.pedantic(play(samples), rounds=len(samples))
        pytestconfig.stash[_rows].append(row)

    return measure


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(machine.machine_info())


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    for name in set(commit_info) - {"id", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        kept = ("min", "max", "median", "iqr", "rounds")
        benchmark["stats"] = {name: benchmark["stats"][name] for name in kept}
        del benchmark["params"], benchmark["options"]
    found = summary.verdicts(benchmark["extra_info"] for benchmark in output_json["benchmarks"])
    output_json["targets"] = [{"text": str(verdict), "met": verdict.met} for verdict in found]


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    for (op, device), group in summary.by_op(rows).items():
        terminalreporter.section(f"{op} on {device}, medians")
        for line in summary.table(group):
            terminalreporter.write_line(line)
    if not rows or _toy(config):
        return
    terminalreporter.section("targets")
    for verdict in summary.verdicts(rows):
        terminalreporter.write_line(str(verdict), green=verdict.met, red=not verdict.met)
    terminalreporter.write_line(summary.noise(rows))
