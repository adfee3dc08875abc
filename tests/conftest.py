"""What every test shares: no hub, no display."""

from __future__ import annotations

import gc
import os

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# A benchmark that a test starts runs in a process of its own; with this it would believe to share the machine's timing.
os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_finish() -> None:
    # A million objects of imported libraries live until the end: every full collection would look at them again.
    gc.collect()
    gc.freeze()
