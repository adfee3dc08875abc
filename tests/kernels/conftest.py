"""Kernel tests run with poisoned memory, and for every implementation that this process can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.kernel_targets import fused_targets, targets


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest value), so that an element an op forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target` is every implementation (of the module's OP), `fused` all but the reference.

    With `dtype` each comes with every dtype that it computes in.
    """
    op = getattr(metafunc.module, "OP", None)
    for name, found in (("target", targets), ("fused", fused_targets)):
        if name not in metafunc.fixturenames:
            continue
        places = [target for target in found() if op is None or target.runs(op)]
        if "dtype" in metafunc.fixturenames:
            pairs = [(target, dtype) for target in places for dtype in target.dtypes]
            metafunc.parametrize((name, "dtype"), pairs, ids=[f"{t}-{str(d)[6:]}" for t, d in pairs])
        else:
            metafunc.parametrize(name, places, ids=str)
