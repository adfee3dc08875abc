from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.fake_gpu import Nvml
from support.fake_slurm import write_commands

from sqdf_fast.compare.devices import DeviceSlot, device_slots, visible_gpus
from sqdf_fast.compare.jobs import Job
from sqdf_fast.compare.launch import ClusterLauncher, LocalLauncher, open_launcher, run_jobs
from sqdf_fast.compare.names import look_up
from sqdf_fast.compare.progress import CompareProgress
from sqdf_fast.compare.worker import RunProcess
from sqdf_fast.config import make_config
from sqdf_fast.errors import Interrupted, UserError


@pytest.fixture
def gpus(monkeypatch):
    """A driver that knows three GPUs, and a torch.cuda that nobody may ask."""
    driver = Nvml()
    driver.nvmlDeviceGetCount = lambda: 3
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def refuse(*_, **__):
        raise AssertionError("CUDA was asked in the process that starts the runs")

    for name in ("is_available", "device_count", "init", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    return driver


def test_runs_are_spread_over_the_gpus_without_a_cuda_context(gpus):
    assert [slot.gpu for slot in device_slots(None, "auto")] == ["0", "1", "2"]
    assert [slot.gpu for slot in device_slots(4, "cuda")] == ["0", "1", "2", "0"]
    assert [slot.gpu for slot in device_slots(2, "cuda:1")] == [None, None]
    assert device_slots(None, "cpu") == [DeviceSlot()]
    for device in ("auto", "cuda", "cuda:2"):
        look_up(make_config("shapes", flags={"device": device}), [])
    assert gpus.opened == 0


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("2,0", ["2", "0"]),
        ("0,7,1", ["0"]),
        ("-1", []),
        ("", []),
        ("GPU-1234,MIG-5678", ["GPU-1234", "MIG-5678"]),
    ],
)
def test_the_gpus_that_the_environment_shows(gpus, monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


def test_without_a_driver_the_cores_are_divided(monkeypatch):
    driver = Nvml()
    driver.closed.add("init")
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert device_slots(5, "auto") == [DeviceSlot(threads=2)] * 5
    assert device_slots(None, "auto") == [DeviceSlot(threads=12)]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert device_slots(2, "auto") == [DeviceSlot()] * 2


@pytest.mark.parametrize(
    ("slot", "found"),
    [
        (DeviceSlot("GPU-1234", 2), "GPU-1234 2"),
        # What submitit would overwrite.
        (DeviceSlot(), "3 1"),
    ],
)
def test_the_environment_of_a_slot(tmp_path, monkeypatch, slot, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = LocalLauncher(tmp_path, 1, "cpu")
    launcher._slots = [slot]
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    ended = subprocess.run(
        [*shlex.split(launcher._python(0)), "-S", "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == found.split()


def test_an_environment_without_the_variable_stays_without_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))"
    ended = subprocess.run(
        [*shlex.split(LocalLauncher(tmp_path, 1, "cpu")._python(0)), "-S", "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == "unset"


class Handle:
    """A run that answers when it is asked as many times as ``patience``."""

    def __init__(self, job: Job, ends: bool, said: str | None) -> None:
        self.job, self.ends, self.said, self.log = job, ends, said, []

    def done(self) -> bool:
        return self.ends or "killed" in self.log

    def stderr(self) -> str | None:
        return self.said


class Scripted:
    """A launcher of runs that end at once, or only when they are killed."""

    def __init__(self, ends: bool = True, said: str | None = None, at_once: int = 2, on_start=lambda: None) -> None:
        self.ends, self.said, self.at_once, self.on_start = ends, said, at_once, on_start
        self.handles: list[Handle] = []
        self.slots: list[int] = []

    def capacity(self, waiting: int) -> int:
        return min(self.at_once, waiting)

    def start(self, job: Job, slot: int) -> Handle:
        self.on_start()
        self.handles.append(Handle(job, self.ends, self.said))
        self.slots.append(slot)
        return self.handles[-1]

    def ask_to_stop(self, handle: Handle) -> None:
        handle.log.append("asked")
        # The user is not willing to wait.
        signal.raise_signal(signal.SIGINT)

    def kill(self, handle: Handle) -> None:
        handle.log.append("killed")


def jobs_in(folder: Path, number: int) -> list[Job]:
    return [Job("sqdf", seed, make_config("shapes"), folder / f"seed-{seed}") for seed in range(number)]


def run(folder: Path, launcher: Scripted, number: int = 3) -> dict[str, str]:
    jobs = jobs_in(folder, number)
    with CompareProgress(len(jobs), Console(file=open(os.devnull, "w"))) as progress:
        return run_jobs(jobs, launcher, progress)


def test_a_second_ctrl_c_ends_the_runs_at_once(tmp_path):
    launcher = Scripted(ends=False, on_start=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path, launcher)
    (handle,) = launcher.handles
    assert handle.log == ["asked", "killed"]


def test_why_a_run_failed(tmp_path):
    killed = f"its process was killed, perhaps for lack of memory; see {tmp_path / 'seed-0.log'}"
    assert run(tmp_path, Scripted(), number=1) == {"sqdf seed 0": killed}
    refused = Scripted(said="Traceback (most recent call last):\nModuleNotFoundError: No module named 'sqdf_fast'\n")
    assert run(tmp_path, refused, number=1) == {"sqdf seed 0": "ModuleNotFoundError: No module named 'sqdf_fast'"}
    # What an earlier attempt wrote is no reason of this one.
    (tmp_path / "seed-0.log").write_text("failed: no disk\n")
    assert run(tmp_path, Scripted(), number=1) == {"sqdf seed 0": killed}
    spoken = Scripted(on_start=lambda: (tmp_path / "seed-0.log").write_text("step 1\nfailed: no light\n"))
    assert run(tmp_path, spoken, number=1) == {"sqdf seed 0": "no light"}


def test_slots_are_used_again(tmp_path):
    launcher = Scripted()
    assert len(run(tmp_path, launcher, number=5)) == 5
    assert set(launcher.slots) == {0, 1}
    assert [handle.job.seed for handle in launcher.handles] == [0, 1, 2, 3, 4]


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    write_commands(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_a_slurm_job_has_the_settings_that_were_given(cluster, monkeypatch):
    (job,) = jobs_in(cluster / "runs", 1)
    (cluster / "bin" / "srun").write_text("#!/bin/bash\n")
    settings = {"partition": "gpu", "time": 240}
    with open_launcher("slurm", cluster, None, "auto", settings) as launcher:
        assert launcher.capacity(7) == 7
        handle = launcher.start(job, 0)
        assert handle.job_id == "7"
        assert isinstance(handle.submission().function, RunProcess)
        assert handle.submission().function == RunProcess(job, os.getcwd())
        launcher.ask_to_stop(handle)
        assert (cluster / ".submitit" / "7_submitted.pkl").exists()
    script = (cluster / "submitted.sh").read_text().splitlines()
    for line in ("--partition=gpu", "--time=240", "--gpus-per-node=1", "--job-name=sqdf-fast", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in script
    assert (cluster / "cancelled").read_text() == "7\n"
    assert not (cluster / ".submitit").exists()


def test_an_interrupted_comparison_leaves_the_files_that_jobs_in_the_queue_need(cluster):
    (cluster / "bin" / "srun").write_text("#!/bin/bash\n")
    launchers = open_launcher("slurm", cluster, None, "auto", {})
    launchers.__enter__().start(*jobs_in(cluster / "runs", 1), 0)
    launchers.__exit__(Interrupted, Interrupted(), None)
    assert (cluster / ".submitit" / "7_submitted.pkl").exists()


def test_what_slurm_cannot_take_is_one_line(cluster, monkeypatch):
    def opened(kind: str, **settings) -> None:
        with open_launcher(kind, cluster, None, "auto", settings):
            pass

    with pytest.raises(UserError, match=r"--slurm: Unavailable parameter\(s\): \['partitoin'\]") as error:
        opened("slurm", partitoin="gpu")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--slurm time=\.\.\. has no effect without --launcher slurm"):
        opened("local", time=20)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--launcher slurm: `srun` is not installed here"):
        opened("slurm")


def test_a_cluster_takes_no_more_jobs_at_a_time_than_asked():
    assert ClusterLauncher(SimpleNamespace(), 3).capacity(7) == 3
