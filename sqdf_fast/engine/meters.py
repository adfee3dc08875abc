"""Meters of a run: peak memory and seconds by stage, and energy."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch

from sqdf_fast.engine.gpu_memory import open_gpu

POWER_INTERVAL = 0.1
"""Seconds between two samples of the power, where the GPU has no energy counter (before Volta)."""


def process_peak_bytes() -> int:
    """Peak host memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StageCounter(Protocol):
    """Counts live bytes where no allocator does; ``sqdf_fast.plan.memory.MemoryCount`` is one."""

    @property
    def stages(self) -> Mapping[str, Any]:
        """By name, objects with ``peak_bytes``: the most that lived in the stage since the counting began."""

    def stage(self, name: str) -> None:
        """What follows belongs to ``name``; "" is outside the stages."""


class StageMeter:
    """Peak live bytes and seconds of every stage; a stage lasts until the next one, or until :meth:`end_step`.

    Peaks are those of the CUDA allocator, which are reset at every stage: read the run's from :attr:`peak_bytes`.
    Seconds on CUDA lie between events on the current stream, so that nothing waits before :meth:`finish`.

    Args:
        device: where the stages run.
        counter: counts live bytes where there is no CUDA allocator; None: peaks of a CPU are not known.
        clock: seconds, of a CPU.
    """

    def __init__(
        self,
        device: torch.device,
        counter: StageCounter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device, self._counter, self._clock = device, counter, clock
        self._cuda = device.type == "cuda"
        # Of one step: names and begins of the stages in order, the last without a name; and their peaks.
        self._marks: list[tuple[str, Any]] = []
        self._peaks: dict[str, int] = {}
        self._ended: list[tuple[list[tuple[str, Any]], dict[str, int]]] = []
        self._highest = 0

    @property
    def live_bytes(self) -> int | None:
        """Bytes that the CUDA allocator has given out; None on a CPU."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else None

    @property
    def peak_bytes(self) -> int | None:
        """The most that was alive at once since the beginning, between the stages too; None where nothing counts."""
        if self._cuda:
            return max(self._highest, torch.cuda.max_memory_allocated(self._device))
        if self._counter is not None:
            return max((stage.peak_bytes for stage in self._counter.stages.values()), default=0)
        return None

    def __call__(self, name: str) -> None:
        """Begin the stage ``name``, which ends the one before it."""
        before = self._marks[-1][0] if self._marks else ""
        peak = None
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self._device)
            self._highest = max(self._highest, peak)
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._counter is not None:
            peak = self._counter.stages[before].peak_bytes if before else None
            self._counter.stage(name)
        if before and peak is not None:
            self._peaks[before] = max(self._peaks.get(before, 0), peak)
        self._marks.append((name, self._now()))

    def end_step(self) -> None:
        """End the last stage; what follows until the next stage belongs to none."""
        if self._marks:
            self("")
            self._ended.append((self._marks, self._peaks))
            self._marks, self._peaks = [], {}

    def drop_step(self) -> None:
        """Forget the stages since the last :meth:`end_step`: they were interrupted and will be run again."""
        self._marks, self._peaks = [], {}
        if not self._cuda and self._counter is not None:
            self._counter.stage("")

    def finish(self) -> list[tuple[str, int | None, float]]:
        """(stage, peak bytes, seconds) in the order of their first run, and start over.

        A stage that came more than once in a step has the largest of its peaks and the sum of its seconds; of several
        steps, the largest peak and the seconds of the slowest.
        """
        self.end_step()
        peaks: dict[str, int] = {}
        slowest: dict[str, float] = {}
        for marks, highest in self._ended:
            if self._cuda:
                marks[-1][1].synchronize()
            total: dict[str, float] = {}
            for (name, begin), (_, end) in pairwise(marks):
                seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
                total[name] = total.get(name, 0.0) + seconds
            slowest |= {name: max(slowest.get(name, 0.0), seconds) for name, seconds in total.items()}
            peaks |= {name: max(peaks.get(name, 0), peak) for name, peak in highest.items()}
        self._ended = []
        return [(name, peaks.get(name), seconds) for name, seconds in slowest.items()]

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class EnergyMeter:
    """Joules of the whole GPU between two points, other processes' share included; close it.

    Read from the driver's counter by NVML; where the GPU has none, power is sampled in a thread and integrated.

    Args:
        interval: seconds between two samples of the power; clock: seconds, for the power.

    Attributes:
        reason: why there is nothing to read, or None.
    """

    def __init__(
        self,
        device: torch.device,
        interval: float = POWER_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reason: str | None = None
        self._interval, self._clock = interval, clock
        self._nvml: Any = None
        self._began: int | None = None
        self._power: _Power | None = None
        opened = open_gpu(device) if device.type == "cuda" else f"{device} is not a GPU: it has no energy counter"
        if isinstance(opened, str):
            self.reason = opened
            return
        self._nvml, self._handle = opened
        self._counts = self._energy() is not None
        if not self._counts and self._watts() is None:
            self.reason = "this GPU reports neither energy nor power"

    def start(self) -> None:
        """Measure from here on; an earlier start is forgotten."""
        self.stop()
        if self.reason is None and self._counts:
            self._began = self._energy()
        elif self.reason is None:
            self._power = _Power(self._watts, self._interval, self._clock)

    def stop(self) -> float | None:
        """Joules since :meth:`start`; None where the driver does not report them, or nothing was started."""
        power, began = self._power, self._began
        self._power = self._began = None
        if power is not None:
            return power.stop()
        ended = None if began is None else self._energy()
        return None if began is None or ended is None else (ended - began) / 1e3

    def close(self) -> None:
        """Shut NVML down."""
        self.stop()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self.reason = None, "the meter is closed"

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def _watts(self) -> float | None:
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def _ask(self, query: str) -> int | None:
        try:
            return int(getattr(self._nvml, query)(self._handle))
        except self._nvml.NVMLError:
            return None


class _Power:
    """Integral of sampled power by the trapezoidal rule; a failed sample makes it unknown."""

    def __init__(self, watts: Callable[[], float | None], interval: float, clock: Callable[[], float]) -> None:
        self._watts, self._interval, self._clock = watts, interval, clock
        self._joules: float | None = 0.0
        self._last: tuple[float, float] | None = None
        self._over = threading.Event()
        self.sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        moment, power = self._clock(), self._watts()
        if power is None:
            self._joules = None
            return
        if self._last is not None and self._joules is not None:
            self._joules += (moment - self._last[0]) * (power + self._last[1]) / 2
        self._last = moment, power

    def stop(self) -> float | None:
        self._over.set()
        self._thread.join()
        self.sample()
        return self._joules

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self.sample()
