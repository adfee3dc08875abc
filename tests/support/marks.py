"""Which cases of a test `make test` leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """A case of a parametrized test that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
