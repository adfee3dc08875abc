"""What a call needs: peak memory by PyTorch's own account, operators and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.timing import Subject

Begin = Callable[[str], None]
Watch = Callable[[Begin], None]
"""Receives a function that the call invokes with the name of each of its stages as it begins."""

_MARK = "stage: "


class Counter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        operators: operators that ran, views left out: on a GPU, about the kernels launched.
        flops: FLOPs of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        # Only now: the planner takes seconds to import.
        from sqdf_fast.plan.memory import FLOPS

        super().__init__()
        self.operators = self.flops = 0
        self._formulas = FLOPS

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators += not function.is_view
        count = self._formulas.get(function.overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


def peak_bytes(subject: Subject, device: str) -> int:
    """The most that one call allocates at a time beyond what it receives."""
    state = subject.prepare()
    return max(stage_peaks(lambda: subject.call(state), device).values())


def stage_peaks(
    call: Callable[[], object],
    device: str,
    watch: Watch = lambda begin: None,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, int]:
    """The most that is allocated at a time in each stage, beyond what is allocated when `call` starts.

    The CUDA allocator's peak, or the allocation events of the profiler on the CPU.

    Args:
        call: the call to observe.
        device: "cpu" or "cuda".
        watch: how the call announces its stages; what comes before the first one is called "".
        settle: a call to run before, observed too: the profiler misses the release of what was allocated earlier.
    """
    return (_cuda_peaks if device == "cuda" else _cpu_peaks)(call, watch, settle)


def _cuda_peaks(call: Callable[[], object], watch: Watch, settle: Callable[[], object]) -> dict[str, int]:
    found: dict[str, int] = {}
    current = ""

    def begin(name: str) -> None:
        nonlocal current
        torch.cuda.synchronize()
        found[current] = max(found.get(current, 0), torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        current = name

    settle()
    watch(begin)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    begin("end")
    return found


def _cpu_peaks(call: Callable[[], object], watch: Watch, settle: Callable[[], object]) -> dict[str, int]:
    def begin(name: str) -> None:
        with torch.profiler.record_function(_MARK + name):
            pass

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        settle()
        watch(begin)
        begin("")
        call()
    named = ((event.name(), event) for event in profile.profiler.kineto_results.events())
    events = [(name, event) for name, event in named if name == "[memory]" or name.startswith(_MARK)]
    events.sort(key=lambda pair: pair[1].start_ns())
    begun = next(number for number, (name, _) in enumerate(events) if name == _MARK)
    found, live, current = {"": 0}, 0, ""
    for name, event in events[begun:]:
        if name == "[memory]":
            live += event.nbytes()
        else:
            current = name.removeprefix(_MARK)
            found.setdefault(current, live)
        found[current] = max(found[current], live)
    return found
