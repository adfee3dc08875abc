"""`pytest bench/ --benchmark-only`: options, cases, tables and JSON; see docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import registry
from cases import ops
from cases.training_step.problem import MODELS
from harness import machine
from harness.benchmark import Benchmark, Choice, Group, Measured, Row, measure, noise
from harness.timing import playback_time

from sqdf_fast.errors import UserError
from sqdf_fast.kernels.dispatch import IMPLEMENTATIONS

_rows = pytest.StashKey[list[Row]]()
_measured = lru_cache(maxsize=1)(measure)  # the contenders of a group follow each other


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sqdf-fast")
    group.addoption("--toy", action="store_true", help="tiny sizes and few rounds: does it run, not how fast")
    group.addoption("--bench-device", default="all", metavar="DEVICE", help="all (default), cpu or cuda")
    group.addoption(
        "--bench-models",
        metavar="NAMES",
        default="",
        help=f"models of the training step: {','.join(MODELS)} (default: shapes on a CPU, the others on CUDA)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    choices = _choices(metafunc.config)
    metafunc.parametrize(
        ("benchmarked", "group", "contender"),
        [
            _parameter(benchmarked, group, contender)
            for benchmarked in registry.BENCHMARKS
            for choice in choices
            for group in benchmarked.groups(choice)
            for contender in group.contenders
        ],
    )


def _parameter(benchmarked: Benchmark, group: Group, contender: str) -> Any:
    name = f"{benchmarked.name}-{group.name}"
    mark = pytest.mark.benchmark(timer=playback_time, group=name)
    return pytest.param(benchmarked, group, contender, id=f"{name}-{contender}", marks=mark)


def _choices(config: pytest.Config) -> list[Choice]:
    models = tuple(filter(None, config.getoption("bench_models").split(",")))
    if unknown := set(models) - set(MODELS):
        raise pytest.UsageError(f"model {min(unknown)} is not measured; allowed: {', '.join(MODELS)}")
    try:
        devices = machine.devices(config.getoption("bench_device"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    return [Choice(device, config.getoption("toy"), models) for device in devices]


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = ["toy sizes: no figure below means anything"] if config.getoption("toy") else []
    for device in (choice.device for choice in _choices(config)):
        for op in ops.OPS:
            reasons = ((name, ops.absent(op, name, device)) for name in IMPLEMENTATIONS)
            missing = "".join(f"; no {name}: {reason}" for name, reason in reasons if reason)
            lines.append(f"{op} on {device}: {', '.join(ops.implementations(op, device))}{missing}")
    return lines


@pytest.fixture
def measured(benchmarked: Benchmark, group: Group, pytestconfig: pytest.Config) -> Measured:
    """What was measured of the whole group."""
    return _measured(benchmarked, group, pytestconfig.getoption("toy"))


@pytest.fixture
def keep(pytestconfig: pytest.Config) -> Callable[[Row], None]:
    """Keeps a row for the tables below the run."""
    return pytestconfig.stash[_rows].append


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
    found = registry.verdicts([benchmark["extra_info"] for benchmark in output_json["benchmarks"]])
    output_json["targets"] = [verdict._asdict() for verdict in found]


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    for title, lines in registry.report(rows):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    if not rows or config.getoption("toy"):
        return
    terminalreporter.section("targets")
    for verdict in registry.verdicts(rows):
        terminalreporter.write_line(verdict.text, green=verdict.met, red=not verdict.met)
    terminalreporter.write_line(noise(rows))
