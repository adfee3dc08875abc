from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(low_contrast_model: Path) -> Path:
    return low_contrast_model
