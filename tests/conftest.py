"""What every test shares: no hub, no display, one seed, one tiny model a session."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Inductor's caches of whole graphs do not know an operator's schema: a graph of an earlier schema would be run again.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# A benchmark that a test starts runs in a process of its own; with this it would believe to share the machine's timing.
os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_finish() -> None:
    # A million objects of imported libraries live until the end: every full collection would look at them again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    import torch

    # Whatever ran before in this process.
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion, which no test writes to; see `support.tiny`."""
    from support.tiny import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def low_contrast_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a decoder of little contrast: where a pixel saturates, the published hard clamp and ours differ."""
    from support.tiny import write_low_contrast

    return write_low_contrast(tmp_path_factory.mktemp("low_contrast") / "tiny")
