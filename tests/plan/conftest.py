"""What PyTorch's own allocator says, to hold predictions against; plans that touch no cache but the test's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sqdf_fast.plan.fake import no_collection


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that ``call`` has allocated at a time on the CPU, by the profiler's allocator events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # What earlier tests left is freed before the profiler looks, or it would count against the call.
    with no_collection(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture(name="allocated_peak")
def _allocated_peak() -> Callable[[Callable[[], object]], int]:
    return allocated_peak


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
