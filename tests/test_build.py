from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sqdf_fast

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """What a fresh interpreter, started outside the source tree, prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.anchor)
    return done.stdout.strip()


def test_the_installed_version_is_the_source_version() -> None:
    assert importlib.metadata.version("sqdf-fast") == sqdf_fast.__version__


def test_importing_the_package_imports_no_library() -> None:
    assert run("import sys, sqdf_fast; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))") == "set()"


def test_every_public_name_resolves() -> None:
    code = "import sqdf_fast; print(sorted(getattr(sqdf_fast, name).__name__ for name in sqdf_fast.__all__))"
    assert run(code) == str(sorted(sqdf_fast.__all__))
    with pytest.raises(AttributeError, match="no_such_name"):
        sqdf_fast.no_such_name  # noqa: B018


def test_kernels_is_a_part_of_the_package_and_not_a_distribution() -> None:
    """transformers probes for a distribution called kernels; ours must not be taken for it."""
    code = (
        "from transformers.utils import is_kernels_available; import sqdf_fast.kernels; "
        "print(sqdf_fast.kernels.__name__, is_kernels_available())"
    )
    assert run(code) == "sqdf_fast.kernels False"


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


def test_without_a_compiler_the_package_builds_without_its_native_library(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("kernels", "sqdf_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    nowhere = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **nowhere}, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "sqdf_fast/kernels/native.py" in names
    assert not [name for name in names if name.endswith(".so")]
