from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_families import WRITERS


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny pipeline folder of every family, by the family's name."""
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name / "pipeline") for name, write in WRITERS.items()}
