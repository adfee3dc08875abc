from __future__ import annotations

import os
import re
import sys
from contextlib import closing

import pytest
import torch
from support.fake_gpu import CUDA, Cuda, Nvml, fake_cuda, fake_nvml

from sqdf_fast.engine.gpu_memory import GIB, DeviceMemory, cap_process
from sqdf_fast.engine.meters import EnergyMeter, StageMeter, _Power
from sqdf_fast.errors import UserError
from sqdf_fast.plan.memory import MemoryCount

CPU = torch.device("cpu")


@pytest.fixture
def nvml(monkeypatch) -> Nvml:
    return fake_nvml(monkeypatch)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    return fake_cuda(monkeypatch)


def test_others_are_what_is_used_without_this_process(cuda, nvml):
    nvml.used = 9 * GIB
    nvml.computing = [(os.getpid(), 3 * GIB), (-7, 5 * GIB)]
    # The desktop computes and draws; it is one process.
    nvml.drawing = [(-7, 5 * GIB), (-8, GIB)]
    memory = DeviceMemory.of(CUDA)
    assert (memory.total, memory.free, memory.reserved) == (24 * GIB, 10 * GIB, 2 * GIB)
    assert (memory.others, memory.processes, memory.reason) == (6 * GIB, 2, None)
    assert memory.available == 18 * GIB
    assert str(memory) == "cuda:0: 10.0 of 24.0 GiB free; 2 other processes use 6.0 GiB"
    assert nvml.opened == 0


def test_a_single_process_of_another_namespace_is_this_one(cuda, nvml):
    nvml.used, nvml.computing = 3 * GIB, [(-7, 5 * GIB // 2)]
    memory = DeviceMemory.of(CUDA)
    assert (memory.others, memory.processes) == (GIB // 2, 0)


def test_several_processes_of_another_namespace_leave_what_pytorch_has_reserved(cuda, nvml):
    nvml.used, nvml.computing = 9 * GIB, [(-7, 5 * GIB), (-8, 3 * GIB), (-9, None)]
    memory = DeviceMemory.of(CUDA)
    assert (memory.others, memory.processes) == (7 * GIB, 2)


@pytest.mark.parametrize("computing", [[], [(os.getpid(), None)]])
def test_a_closed_process_list_leaves_what_pytorch_has_reserved(cuda, nvml, computing):
    nvml.used, nvml.computing = 9 * GIB, computing
    if not computing:
        nvml.closed = {"processes"}
    memory = DeviceMemory.of(CUDA)
    assert memory.others == 7 * GIB
    assert memory.processes == (0 if computing else None)


def test_memory_of_the_driver_itself_counts_with_old_drivers_only(cuda, nvml):
    nvml.used, nvml.driver, nvml.computing = 9 * GIB, GIB // 2, [(os.getpid(), 9 * GIB)]
    assert DeviceMemory.of(CUDA).others == 0
    nvml.closed = {"memory v2"}
    assert DeviceMemory.of(CUDA).others == GIB // 2


def test_a_partition_of_a_gpu_is_found_by_its_own_name(cuda, nvml):
    nvml.kind, nvml.used = "MIG", 5 * GIB
    assert DeviceMemory.of(CUDA).others == 3 * GIB


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda nvml: nvml.closed.add("init"), "no NVIDIA driver: Driver Not Loaded"),
        (
            lambda nvml: nvml.closed.update({"memory v1", "memory v2"}),
            "the driver refuses the query: memory v1 not permit",
        ),
        (lambda nvml: setattr(nvml, "kind", "VGPU"), "the driver does not know cuda:0: Not Found"),
    ],
)
def test_without_the_driver_cudas_own_figures_remain(cuda, nvml, break_it, reason):
    break_it(nvml)
    memory = DeviceMemory.of(CUDA)
    assert (memory.others, memory.processes) == (None, None)
    assert reason in memory.reason
    # What is free and what is ours already.
    assert memory.available == 12 * GIB
    assert str(memory).startswith("cuda:0: 10.0 of 24.0 GiB free; what other processes use is not known (")
    assert nvml.opened == 0


def test_without_the_package_the_reason_names_it(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert DeviceMemory.of(CUDA).reason == "the package nvidia-ml-py is missing"


def test_a_cpu_has_no_memory_of_its_own(nvml):
    memory = DeviceMemory.of(CPU)
    assert (memory.total, memory.free, memory.others, memory.available) == (None, None, None, None)
    assert str(memory) == "cpu is not a GPU: its memory is the machine's own"


def test_the_cap_is_the_allocators_share_of_the_card(cuda, nvml):
    nvml.used, nvml.computing = 4 * GIB, [(os.getpid(), 3 * GIB), (-7, GIB)]
    assert cap_process(CUDA, 12 * GIB) == 12 * GIB
    assert cap_process(CUDA, 13 * GIB, context_bytes=GIB) == 12 * GIB
    # 24 are asked for and 23 can be had, which is more than the plan needs.
    assert cap_process(CUDA, 24 * GIB, needed=20 * GIB) == 23 * GIB
    assert cuda.fractions == [0.5, 0.5, 23 / 24]


def test_a_cpu_is_not_capped(cuda):
    assert cap_process(CPU, 2**60, needed=2**60) == 2**60
    assert cuda.fractions == []


@pytest.mark.parametrize(
    ("computing", "closed", "holders"),
    [
        ([(os.getpid(), 0), (-7, 9 * GIB)], set(), "1 other process uses"),
        ([(os.getpid(), 0), (-7, 8 * GIB), (-8, GIB)], set(), "2 other processes use"),
        ([], {"processes"}, "other processes use"),
    ],
)
def test_a_budget_that_others_hold_is_refused(cuda, nvml, computing, closed, holders):
    cuda.reserved, nvml.used, nvml.computing, nvml.closed = 0, 9 * GIB, computing, closed
    with pytest.raises(UserError) as refusal:
        cap_process(CUDA, 20 * GIB, needed=16 * GIB)
    assert str(refusal.value) == (
        f"16.0 GiB of cuda:0 are not available: {holders} 9.0 of its 24.0 GiB; "
        "stop them (nvidia-smi lists them), or give --vram 15.0G or less"
    )
    assert cuda.fractions == []


def test_a_budget_is_refused_by_cudas_own_figures_where_the_driver_is_silent(cuda, nvml):
    nvml.closed = {"init"}
    cuda.free, cuda.reserved = GIB // 4, GIB // 4
    message = "8.0 GiB of cuda:0 are not available: other processes use 23.5 of its 24.0 GiB; .*, or use another GPU$"
    with pytest.raises(UserError, match=message):
        cap_process(CUDA, 8 * GIB)


def test_a_card_that_is_too_small_says_its_size(cuda, nvml):
    nvml.used = 2 * GIB
    with pytest.raises(UserError, match=r"^cuda:0 has 24\.0 GiB and 32\.0 are needed; give --vram 24\.0G or less$"):
        cap_process(CUDA, 40 * GIB, needed=32 * GIB)


def test_a_budget_below_the_context_is_refused(cuda, nvml):
    nvml.used = 2 * GIB
    with pytest.raises(UserError, match=r"0\.5 GiB on cuda:0 is not more than the 0\.6 GiB .*; give a larger --vram"):
        cap_process(CUDA, GIB // 2, context_bytes=6 * GIB // 10)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_stages_on_a_cpu_have_seconds_and_no_peak():
    clock = Clock()
    meter = StageMeter(CPU, clock=clock)
    for name, seconds in (("forward", 1.0), ("backward", 2.0), ("forward", 4.0)):
        meter(name)
        clock.now += seconds
    meter.end_step()
    clock.now += 100
    assert meter.finish() == [("forward", None, 5.0), ("backward", None, 2.0)]
    assert meter.peak_bytes is meter.live_bytes is None
    assert meter.finish() == []


def test_of_several_steps_the_slowest_counts():
    clock = Clock()
    meter = StageMeter(CPU, clock=clock)
    for seconds in (3.0, 8.0, 5.0):
        meter("reward")
        clock.now += seconds
        meter.end_step()
    assert meter.finish() == [("reward", None, 8.0)]


def test_a_dropped_step_is_forgotten_and_the_ones_before_it_are_not():
    clock = Clock()
    meter = StageMeter(CPU, clock=clock)
    meter("reward")
    clock.now += 2
    meter.end_step()
    meter.drop_step()
    meter("reward")
    clock.now += 50
    meter.drop_step()
    meter("optimizer")
    clock.now += 3
    assert meter.finish() == [("reward", None, 2.0), ("optimizer", None, 3.0)]


def test_peaks_on_a_cpu_are_the_counters():
    with MemoryCount() as counter:
        meter = StageMeter(CPU, counter)
        kept = torch.zeros(1000)
        meter("small")
        small = torch.zeros(500)
        meter("large")
        large = torch.zeros(3000)
        del small, large
        meter("small")
        torch.zeros(100)
        meter.end_step()
        between = torch.zeros(8000)
    assert [(name, peak) for name, peak, _ in meter.finish()] == [("small", 6000), ("large", 18000)]
    assert meter.peak_bytes == 4 * (1000 + 8000)
    del kept, between


def test_peaks_and_seconds_on_cuda_are_the_allocators_and_the_streams(cuda):
    meter = StageMeter(CUDA)
    cuda.allocate(100)
    cuda.allocate(900)
    cuda.allocate(-900)
    for name, size, milliseconds in (("transition", 50, 1000), ("reward", 300, 2000), ("transition", 80, 500)):
        meter(name)
        cuda.allocate(size)
        cuda.allocate(-size)
        cuda.milliseconds += milliseconds
    meter.end_step()
    assert cuda.waits == 0
    assert meter.finish() == [("transition", 180, 1.5), ("reward", 400, 2.0)]
    assert cuda.waits == 1
    # What was alive before the first stage is the run's peak, and no stage's.
    assert meter.peak_bytes == 1000
    cuda.allocate(2000)
    assert meter.peak_bytes == meter.live_bytes == 2100
    meter("reward")
    assert meter.finish() == [("reward", 2100, 0.0)]
    assert meter.peak_bytes == 2100


def test_the_peak_of_a_dropped_step_is_no_stages(cuda):
    meter = StageMeter(CUDA)
    meter("reward")
    cuda.allocate(5000)
    cuda.allocate(-5000)
    meter.drop_step()
    meter("reward")
    cuda.allocate(70)
    assert meter.finish() == [("reward", 70, 0.0)]
    assert meter.peak_bytes == 5000


def test_energy_is_the_difference_of_the_drivers_counter(cuda, nvml):
    with closing(EnergyMeter(CUDA)) as meter:
        assert meter.reason is None
        assert meter.stop() is None
        meter.start()
        nvml.millijoules += 2500
        assert meter.stop() == 2.5
        assert meter.stop() is None
        meter.start()
        nvml.closed = {"energy"}
        assert meter.stop() is None
    assert nvml.opened == 0


def test_without_a_counter_energy_is_power_times_time(cuda, nvml):
    nvml.closed = {"energy"}
    clock = Clock()
    # No sample falls between start and stop: their mean power times the time between them.
    with closing(EnergyMeter(CUDA, interval=3600, clock=clock)) as meter:
        meter.start()
        clock.now, nvml.milliwatts = 10.0, 300_000
        assert meter.stop() == 2000.0
        meter.start()
        nvml.closed = {"energy", "power"}
        assert meter.stop() is None
    assert nvml.opened == 0


def test_power_is_summed_by_the_trapezoidal_rule():
    clock, watts = Clock(), iter([100.0, 300.0, 300.0, 0.0])
    power = _Power(lambda: next(watts), 3600, clock)
    for moment in (1.0, 3.0):
        clock.now = moment
        power.sample()
    clock.now = 4.0
    assert power.stop() == 200 + 600 + 150
    assert not power._thread.is_alive()


@pytest.mark.parametrize(
    ("device", "closed", "reason"),
    [
        (CPU, set(), "cpu is not a GPU: it has no energy counter"),
        (CUDA, {"init"}, "no NVIDIA driver: Driver Not Loaded"),
        (CUDA, {"energy", "power"}, "this GPU reports neither energy nor power"),
    ],
)
def test_where_nothing_can_be_read_joules_are_none_and_the_reason_is_said(cuda, nvml, device, closed, reason):
    nvml.closed = closed
    with closing(EnergyMeter(device)) as meter:
        assert re.match(reason, meter.reason)
        meter.start()
        assert meter.stop() is None
    assert nvml.opened == 0
