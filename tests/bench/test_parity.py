from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ops, parity
from cases.ops import implementations
from cases.parity import Setup, make
from harness.benchmark import Group, measure

from sqdf_fast.kernels.spec import Inputs, Problem

SHAPES = {"discounted_loss": (4, 64)}
PROBLEMS = [
    Problem(op, "sd15", SHAPES.get(op, (2, 4, 8, 8)), dtype, "cpu", noise)
    for op, noise in (
        ("denoise_step", "given"),
        ("denoise_step", "drawn"),
        ("posterior_mean", ""),
        ("discounted_loss", ""),
        ("philox", "drawn"),
    )
    for dtype in ((torch.float32, torch.bfloat16) if op in ("denoise_step", "posterior_mean") else (torch.float32,))
]


WRONG = """
def pytest_configure():
    import dataclasses

    from sqdf_fast.kernels import registry

    spec = registry.spec("philox")
    ours = spec.benchmark.ours
    wrong = lambda problem, given, impl: tuple(x * (1 + (impl == "native") * 1e-4) for x in ours(problem, given, impl))
    object.__setattr__(spec, "benchmark", dataclasses.replace(spec.benchmark, ours=wrong))
"""


def check(setup, forward, **options):
    return parity.fault(setup, parity.truth(setup), forward, **options)


def altered(setup, change):
    """The reference with its outputs put through `change`."""
    forward = setup.forward("reference")
    return lambda: change(*forward())


@pytest.fixture(params=PROBLEMS, ids=lambda problem: f"{problem.op}-{problem.noise}-{problem.dtype}")
def setup(request):
    return make(request.param)


def test_every_implementation_that_runs_here_is_inside_the_budget(setup):
    names = [name for name in implementations(setup.problem.op, "cpu") if name != "compile"]
    for name in [*names, "reference"]:
        own = setup.problem.noise == "drawn" and name == "eager"
        assert check(setup, setup.forward(name), own_noise=own) is None, name


def test_the_baseline_that_draws_inside_is_inside_the_budget(monkeypatch):
    """What eager runs for drawn noise on CUDA, here on tensors of the CPU."""
    setup = make(Problem("denoise_step", "sd15", (2, 4, 32, 32), torch.float32, "cpu", "drawn"))
    on_cuda = replace(setup, problem=replace(setup.problem, device="cuda"))
    drawing = on_cuda.forward("eager")
    assert check(setup, drawing, own_noise=True) is None
    assert not torch.equal(drawing()[0], drawing()[0])
    monkeypatch.setattr(torch, "randn_like", lambda x: 2 * torch.randn(x.shape))
    assert "variance" in check(setup, drawing, own_noise=True)


def test_a_result_ten_times_the_budget_off_is_seen(setup):
    # Nothing but the first output's value is wrong; its gradient stays as it is.
    excess = 10 * parity.ALLOWANCE[setup.problem.dtype]

    def change(first, *others):
        return first + excess * first.detach(), *others

    assert "relative error" in check(setup, altered(setup, change))


@pytest.mark.parametrize("leaf", ["x", "policy"])
def test_a_wrong_gradient_is_seen_where_the_values_are_right(leaf):
    setup = make(PROBLEMS[0])
    extra = setup.inputs.given[leaf][:2]

    def change(x_prev, kl):
        return x_prev + 0.01 * (extra - extra.detach()), kl

    assert check(setup, altered(setup, change)).startswith(f"d {leaf}: relative error")


def test_a_wrong_kl_of_one_sample_is_seen():
    setup = make(PROBLEMS[0])
    factor = torch.tensor([1.0, 1 + 1e-5])
    fault = check(setup, altered(setup, lambda x_prev, kl: (x_prev, kl * factor)))
    assert fault.startswith("kl: relative error")
    assert "of row 1" in fault


def test_nan_and_a_wrong_shape_are_seen(setup):
    assert "nan" in check(setup, altered(setup, lambda first, *others: (first * float("nan"), *others)))
    if setup.problem.op == "philox":
        assert "has shape" in check(setup, altered(setup, lambda noise: (noise[:1],)))


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        (lambda noise: 1.5 * noise, "variance"),
        (lambda noise: noise + 0.5, "mean"),
        (lambda noise: noise[:1].expand_as(noise), "samples"),
        (lambda noise: noise.sort().values, "neighbors"),
    ],
)
def test_noise_of_its_own_has_to_be_white_and_standard_normal(change, moment):
    setup = make(Problem("philox", "sd15", (2, 4096), torch.float32, "cpu", "drawn"))
    assert moment in check(setup, altered(setup, lambda noise: (change(noise),)), own_noise=True)


def test_wrong_noise_behind_a_denoising_step_is_detected():
    setup = make(PROBLEMS[2])
    assert setup.problem.noise == "drawn"
    given = {name: tensor for name, tensor in setup.inputs.given.items() if name != "seed"}
    noise = 2 * torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(1))
    forward = Setup(PROBLEMS[0], Inputs({**given, "noise": noise})).forward("reference")
    assert "variance" in check(setup, forward, own_noise=True)


@pytest.fixture
def tampered(monkeypatch):
    """Measure denoise_step with one implementation wrong, or raising."""

    def tamper(name, change, direction):
        forward = Setup.forward
        monkeypatch.setattr(
            Setup,
            "forward",
            lambda setup, wanted: (
                (lambda: change(*forward(setup, "reference")())) if wanted == name else forward(setup, wanted)
            ),
        )
        fields = {"direction": direction, "device": "cpu"}
        ops._checked.cache_clear()
        benchmark = next(found for found in ops.BENCHMARKS if found.name == "denoise_step")
        return measure(benchmark, Group("", ("eager", name), fields, PROBLEMS[0]), toy=True)

    yield tamper
    ops._checked.cache_clear()


def test_without_parity_there_is_no_number(tampered):
    measured = tampered("native", lambda x_prev, kl: (1.001 * x_prev, kl), "both")
    assert measured.rows["native"]["fault"].startswith("x_prev: relative error 1.00e-03")
    assert set(measured.samples) == {"eager"}
    assert measured.rows["eager"]["peak_bytes"] > 0
    assert not {"median_seconds", "peak_bytes"} & set(measured.rows["native"])


def test_an_implementation_that_raises_leaves_the_others_their_numbers(tampered):
    def change(*outputs):
        raise RuntimeError("no such instruction")

    measured = tampered("native", change, "forward")
    assert "RuntimeError" in measured.rows["native"]["fault"]
    assert "no such instruction" in measured.rows["native"]["fault"]
    assert len(measured.samples["eager"]) >= 2
    assert measured.rows["eager"]["copy_gb_per_second"] > 0


@pytest.mark.slow
def test_a_wrong_implementation_fails_and_gets_no_number(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--toy", "--bench-device=cpu"]
    command += ["-k", "philox and sdxl", "-p", "wrong", "-p", "no:cacheprovider", f"--benchmark-json={output}"]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=Path(ops.__file__).parents[2], env=environment, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "no parity, no number: noise: relative error 1.00e-04" in found.stdout
    rows = [benchmark["extra_info"] for benchmark in json.loads(output.read_text())["benchmarks"]]
    assert [row["implementation"] for row in rows] == ["eager"]
    shown = found.stdout.split("philox on cpu, medians")[1].split("short test summary")[0]
    assert "eager" in shown
    assert "native" not in shown
