from __future__ import annotations

import importlib.metadata
import subprocess
import sys
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
