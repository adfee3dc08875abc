from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import sqdf_fast
from sqdf_fast.kernels import native

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """What a fresh interpreter, started outside the source tree, prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.anchor)
    return done.stdout.strip()


def test_the_installed_version_is_the_source_version() -> None:
    assert importlib.metadata.version("sqdf-fast") == sqdf_fast.__version__


def test_importing_the_package_imports_no_library() -> None:
    assert run("import sys, sqdf_fast; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))") == "set()"


@pytest.mark.slow
def test_every_public_name_resolves() -> None:
    code = "import sqdf_fast; print(sorted(getattr(sqdf_fast, name).__name__ for name in sqdf_fast.__all__))"
    assert run(code) == str(sorted(sqdf_fast.__all__))
    with pytest.raises(AttributeError, match="no_such_name"):
        sqdf_fast.no_such_name  # noqa: B018


PROBE = """
import os, sys
sys.path += filter(None, [os.environ.get("STAND_IN")])
leave = sys.exit

def probe(status=None):
    import kernels
    print(getattr(kernels, "__file__", None))
    if "PROBE_LIBRARIES" in os.environ:
        import bitsandbytes, diffusers.utils, sqdf_fast.kernels, transformers.utils
        print(transformers.utils.is_kernels_available(), diffusers.utils.is_kernels_available())
        print(sqdf_fast.kernels.__name__)
    leave(status)

sys.exit = probe
"""


@pytest.fixture
def probing(tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Start Python in the checkout or through the installed script; at its end it prints what `kernels` is to it."""
    (tmp_path / "sitecustomize.py").write_text(PROBE)

    def start(started: str, **environment: str) -> tuple[list[str], str]:
        script = Path(sysconfig.get_path("scripts")) / "sqdf-fast"
        command, folder = {
            "in the checkout": ([sys.executable, "-c", "import sys; print(); sys.exit()"], ROOT),
            "through the script": ([script, "--version"], tmp_path),
        }[started]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
        return done.stdout.splitlines()[1:], done.stderr

    return start


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a distribution called kernels, of the oldest version that transformers takes."""
    folder = tmp_path / "stand_in"
    for name in ("kernels", f"kernels-{KERNELS_MIN_VERSION}.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("")
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA").write_text(metadata)
    return folder


STARTED = pytest.mark.parametrize("started", ["in the checkout", "through the script"])


@STARTED
def test_the_kernels_distribution_is_imported_and_not_our_folder(probing, stand_in: Path, started: str) -> None:
    lines, _ = probing(started, STAND_IN=str(stand_in))
    assert lines == [f"{stand_in}/kernels/__init__.py"]


@pytest.mark.slow
@pytest.mark.parametrize("started", ["in the checkout", pytest.param("through the script", marks=pytest.mark.slow)])
def test_other_libraries_do_not_take_our_folder_for_the_kernels_distribution(probing, started: str) -> None:
    lines, printed = probing(started, PROBE_LIBRARIES="1")
    assert lines == ["None", "False False", "sqdf_fast.kernels"]
    # With AVX512-BF16 bitsandbytes always recommends the distribution and says why its import failed.
    assert str(ROOT) not in printed
    own = "Failed to load CPU gemm_4bit_forward from kernels-community"
    assert not [line for line in printed.splitlines() if "kernels" in line and not line.startswith(own)]


@pytest.mark.slow
@STARTED
def test_other_libraries_see_the_kernels_distribution(probing, stand_in: Path, started: str) -> None:
    lines, _ = probing(started, STAND_IN=str(stand_in), PROBE_LIBRARIES="1")
    assert lines == [f"{stand_in}/kernels/__init__.py", "True True", "sqdf_fast.kernels"]


def test_the_entry_point_is_the_command_line() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sqdf-fast")
    assert script.value == "sqdf_fast.cli:main"


def test_every_declared_dependency_has_a_tested_version() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    tested = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    for text in importlib.metadata.requires("sqdf-fast") or []:
        declared = Requirement(text)
        if canonicalize_name(declared.name) != "sqdf-fast":
            (pin,) = tested[canonicalize_name(declared.name)]
            assert pin.operator == "=="
            assert declared.specifier.contains(pin.version), text


def build_wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """The package built in a copy of its sources."""
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("kernels", "sqdf_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=True, capture_output=True)
    (wheel,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_without_a_compiler_the_package_builds_without_its_native_library(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    names = wheel.namelist()
    assert str(wheel.filename).endswith("-py3-none-any.whl")
    assert {"sqdf_fast/kernels/__init__.py", "sqdf_fast/kernels/native.py"} <= set(names)
    assert not [name for name in names if name.startswith("kernels/")]
    assert not [name for name in names if name.endswith(".so")]
    data = ("display/templates/page.html", "display/templates/page.css", "display/templates/macros.html")
    data += ("display/templates/plots.mplstyle", "runs/report.html", "compare/report.html", "commands/verdict.html")
    assert {f"sqdf_fast/{name}" for name in data} <= set(names)


RESULTS = """
import hashlib, itertools, torch
from sqdf_fast.kernels import native
from sqdf_fast.kernels.dispatch import module

def raw(op, function):
    arguments = getattr(module(op, "reference"), function.title())
    return lambda *given: getattr(module(op, "native"), function)(arguments(*given))

forward, backward = (raw("denoise_step", function) for function in ("forward", "backward"))
mean, mean_backward = (raw("posterior_mean", function) for function in ("forward", "backward"))
torch.manual_seed(0)
torch.set_num_threads(2)
table, index, results = torch.rand(9, 3) + 0.1, torch.tensor([3, 7]), []
dtypes = torch.float32, torch.float16, torch.bfloat16
for dtype, g, (numel, traffic) in itertools.product(dtypes, (1.0, 7.5), ((8200, None), (24592, 0))):
    native.limit_cached_traffic(traffic)
    x, noise, grad = torch.randn(3, 2, numel).to(dtype).unbind()
    policy, reference = torch.randn(2, 2 if g == 1 else 4, numel).to(dtype).unbind()
    results += forward(x, policy, reference, table, index, g, noise, None, 0.5, True)
    results += forward(x, policy, reference, table, index, g, None, torch.tensor([5, -9]), 0.5, True)
    results += backward(grad, torch.randn(2), results[-1], table, index, g, 0.5, dtype, dtype)
    results += [mean(x, policy, table[:, :2], index, g, dtype)]
    results += mean_backward(grad, table[:, :2], index, g, dtype, dtype)
assert all(torch.isfinite(result).all() for result in results)
print(hashlib.sha256(b"".join(result.double().numpy().tobytes() for result in results)).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_compiler_builds_without_a_warning_a_library_with_the_same_results(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", "")
    if native.find() is None:
        pytest.skip("installed without the native library")
    wheel = build_wheel(tmp_path, CXX=compiler, CXXFLAGS="-Werror")
    (library,) = (name for name in wheel.namelist() if name.endswith(".so"))
    built = wheel.extract(library, tmp_path)
    installed = run(RESULTS)
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", built)
    assert run(RESULTS) == installed
