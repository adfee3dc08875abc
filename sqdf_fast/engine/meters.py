"""Meters of a run: peak memory and seconds by stage, and energy.

Energy comes from NVML (package nvidia-ml-py). Without it, or without its permission, a figure is None and a sentence
says why.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sqdf_fast.engine.gpu_memory import open_gpu

if TYPE_CHECKING:
    from typing_extensions import Self

POWER_INTERVAL = 0.1
"""Seconds between two samples of the power, where the GPU has no energy counter (before Volta)."""


def process_peak_bytes() -> int:
    """The most memory that this process has held, in bytes of the host's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StageCounter(Protocol):
    """Counts the bytes that live in a stage where no allocator does; ``sqdf_fast.plan.memory.MemoryCount`` is one."""

    @property
    def stages(self) -> Mapping[str, Any]:
        """By name, objects with ``peak_bytes``: the most that lived in the stage since the counting began."""

    def stage(self, name: str) -> None:
        """What follows belongs to ``name``; "" is what no stage claims."""


@dataclass
class _Step:
    """The boundaries of one step's stages in order, the last without a name, and the peak of each stage."""

    marks: list[tuple[str, Any]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)


class StageMeter:
    """Peak live bytes and seconds of every stage; give it to ``Executor.on_stage``.

    A stage lasts from its name to the next one, or to :meth:`end_step`. Peaks are those of the CUDA allocator, whose
    own peak is reset at every boundary: read the run's from :attr:`peak_bytes`. Seconds on CUDA lie between events on
    the current stream, so that nothing waits before :meth:`finish`.

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
        self._current = _Step()
        self._ended: list[_Step] = []
        self._stage = ""
        self._highest = 0

    @property
    def live_bytes(self) -> int | None:
        """What the CUDA allocator has given out and not got back; None on a CPU."""
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
        """The stage ``name`` begins, and the one before it is over."""
        self._close_stage()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._counter is not None:
            self._counter.stage(name)
        self._current.marks.append((name, self._now()))
        self._stage = name

    def end_step(self) -> None:
        """The last stage is over; what follows until the next stage belongs to none."""
        if self._current.marks:
            self("")
            self._ended.append(self._current)
            self._current = _Step()

    def drop_step(self) -> None:
        """Forget the stages since the last :meth:`end_step`: they were interrupted and will be run again."""
        self._current, self._stage = _Step(), ""
        if not self._cuda and self._counter is not None:
            self._counter.stage("")

    def finish(self) -> list[tuple[str, int | None, float]]:
        """(stage, peak bytes, seconds) in the order of their first run; then the meter begins anew.

        A stage that came more than once in a step has the largest of its peaks and the sum of its seconds; of several
        steps, the largest peak and the seconds of the slowest.
        """
        self.end_step()
        peaks: dict[str, int | None] = {}
        slowest: dict[str, float] = {}
        for step in self._ended:
            for name, seconds in self._seconds(step).items():
                slowest[name] = max(slowest.get(name, 0.0), seconds)
                found = [peak for peak in (peaks.get(name), step.peaks.get(name)) if peak is not None]
                peaks[name] = max(found, default=None)
        self._ended = []
        return [(name, peaks[name], seconds) for name, seconds in slowest.items()]

    def _close_stage(self) -> None:
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self._device)
            self._highest = max(self._highest, peak)
        elif self._counter is not None and self._stage:
            peak = self._counter.stages[self._stage].peak_bytes
        else:
            return
        if self._stage:
            self._current.peaks[self._stage] = max(self._current.peaks.get(self._stage, 0), peak)

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, step: _Step) -> dict[str, float]:
        if self._cuda:
            step.marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (name, begin), (_, end) in zip(step.marks, step.marks[1:], strict=False):
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            total[name] = total.get(name, 0.0) + seconds
        return total


class EnergyMeter:
    """Joules that the whole GPU takes between two points, other processes' share included.

    Read from the driver's counter; where the GPU has none, power is sampled in a thread and summed over time. A context
    manager; otherwise close it.

    Args:
        device: a CPU has no such counter here.
        interval: seconds between two samples of the power.
        clock: seconds, for the power.

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
        opened = open_gpu(device) if device.type == "cuda" else f"{device} is no GPU: it has no energy counter"
        if isinstance(opened, str):
            self.reason = opened
            return
        self._nvml, self._handle = opened
        self._counts = self._supports("nvmlDeviceGetTotalEnergyConsumption")
        if not self._counts and not self._supports("nvmlDeviceGetPowerUsage"):
            self.reason = "this GPU tells neither energy nor power"

    def start(self) -> None:
        """From here on; an earlier start is forgotten."""
        self.stop()
        if self.reason is None and self._counts:
            self._began = self._energy()
        elif self.reason is None:
            self._power = _Power(self._watts, self._interval, self._clock)

    def stop(self) -> float | None:
        """Joules since :meth:`start`; None where the driver does not tell, or nothing was started."""
        power, began = self._power, self._began
        self._power = self._began = None
        if power is not None:
            return power.stop()
        if began is None:
            return None
        ended = self._energy()
        return None if ended is None else (ended - began) / 1e3

    def close(self) -> None:
        """Let go of the driver."""
        self.stop()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self.reason = None, "the meter is closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _supports(self, query: str) -> bool:
        return self._ask(query) is not None

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def _watts(self) -> float | None:
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def _ask(self, query: str) -> int | None:
        try:
            found: int = getattr(self._nvml, query)(self._handle)
        except self._nvml.NVMLError:
            return None
        return found


class _Power:
    """Integral of sampled power by the trapezoidal rule."""

    def __init__(self, watts: Callable[[], float | None], interval: float, clock: Callable[[], float]) -> None:
        self._watts, self._interval, self._clock = watts, interval, clock
        self._joules: float | None = 0.0
        self._last: tuple[float, float] | None = None
        self._over = threading.Event()
        self.sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """One more point of the curve; a sample that fails makes the integral unknown."""
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
