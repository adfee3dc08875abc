"""The whole command on a tiny model: killed, continued, stopped, refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.fake_slurm import write_commands
from support.tiny import write_pipeline

from sqdf_fast.cli import main
from sqdf_fast.compare.command import Comparison, stored_protocol
from sqdf_fast.compare.jobs import is_finished
from sqdf_fast.runs import read_metrics
from sqdf_fast.runs.checkpoint import checkpoints, read_checkpoint

REWARDS = """
import time

def slow_brightness(images, prompts):
    time.sleep(0.05)
    return images.mean(dim=(1, 2, 3))
"""
SETTINGS = [
    *("--prompts", "prompts.txt", "--reward", "my_rewards:slow_brightness", "--device", "cpu"),
    *("--set", "objective.lookahead=tweedie", "--set", "objective.alpha=0.01"),
    *("--set", "sampling.num_inference_steps=4", "--set", "sampling.batch_size=4"),
    *("--set", "optimizer.batch_size=2", "--set", "replay.refill=2", "--set", "replay.steps_per_refill=2"),
    *("--set", "execution.executor=joint", "--set", "execution.micro_batch=2"),
    *("--set", "evaluation.num_prompts=2", "--set", "evaluation.images_per_prompt=2", "--set", "evaluation.grid=2"),
    *("--budget", "240", "--points", "5"),
]
# No process of its own: what a run's process does, without the seconds in which it starts.
IN_PROCESS = ("--launcher", "debug")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    return tmp_path


def arguments(model: Path, *more: str) -> list[str]:
    return ["compare", "--model", str(model), *SETTINGS, "--output", "out", *more]


def wait_for(condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def evaluations(run: Path) -> list[dict]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "evaluation"]


def checkpointed(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def unlocked(path: Path) -> bool:
    """Whether no process works on that run any more."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [IN_PROCESS, ()], ids=["debug", "local"])
def test_killed_and_started_again(model, folder, capsys, launcher):
    runs = folder / "out" / "runs"
    finished, broken_off = runs / "sqdf" / "seed-0", runs / "draft-1" / "seed-0"
    command = arguments(model, "--methods", "sqdf,draft-1", "--seeds", "0,1", "--jobs", "1")
    process = subprocess.Popen([sys.executable, "-m", "sqdf_fast.cli", *command], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(checkpointed(broken_off)) >= 2 or process.poll() is not None)
    assert process.returncode is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its runs do not survive it.
    wait_for(lambda: unlocked(runs / "draft-1" / ".seed-0.lock"), seconds=20)
    assert is_finished(finished)
    assert not is_finished(broken_off)
    before, known = (finished / "metrics.jsonl").read_bytes(), evaluations(broken_off)

    assert main([*command, *launcher]) == 0
    said = capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before
    # Evaluations up to the last checkpoint are the ones that were made before; each is there once.
    after = evaluations(broken_off)
    assert after[: len(known) - 1] == known[:-1]
    steps = [record["step"] for record in after]
    assert steps == sorted(set(steps))
    assert all(is_finished(runs / method / f"seed-{seed}") for method in ("sqdf", "draft-1") for seed in (0, 1))
    assert "At equal proxy reward" in said
    assert str(Path("out") / "report.html") in said

    results = json.loads((folder / "out" / "results.json").read_text())
    assert [(method["name"], [run["seed"] for run in method["runs"]]) for method in results["methods"]] == [
        ("sqdf", [0, 1]),
        ("draft-1", [0, 1]),
    ]
    for method in results["methods"]:
        for run in method["runs"]:
            spent = [point["unet_evaluations"] for point in run["curve"]]
            assert spent[0] == 0
            assert spent == sorted(spent)
            assert 240 <= spent[-1] < 240 + 40
            assert run["curve"][-1]["reward_evaluations"] > 0
    assert (folder / "out" / "plots" / "methods_diversity_against_proxy_reward.png").exists()

    # Nothing is left to do, and other protocols are refused.
    assert main(["compare", "--resume", "out"]) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main([*command, "--set", "policy.rank=2"]) == 2
    assert "out belongs to another comparison: its settings is" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_that_train_nothing_have_a_point_for_each_strength(model, folder, capsys):
    assert main(arguments(model, "--methods", "best-of-n", "--seeds", "3,4", *IN_PROCESS)) == 0
    (method,) = json.loads((folder / "out" / "results.json").read_text())["methods"]
    assert method["cost_is"] == "of one picture"
    # One run: every seed would give the same.
    (run,) = method["runs"]
    assert run["seed"] == 3
    assert [point["reward_evaluations"] for point in run["curve"]] == [1, 2, 4, 8]
    # Four guided steps of each candidate.
    assert [point["unet_evaluations"] for point in run["curve"]] == [8, 16, 32, 64]
    proxies = [point["scores"]["proxy_reward"] for point in run["curve"]]
    assert proxies == sorted(proxies)
    assert proxies[0] < proxies[-1]
    assert "64 an image" in capsys.readouterr().out

    # Broken off after two strengths: those stay as they are, the others are drawn again.
    metrics = folder / "out" / "runs" / "best-of-n" / "seed-3" / "metrics.jsonl"
    before = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(before[:2]))
    assert main(["compare", "--resume", "out", *IN_PROCESS]) == 0
    after = metrics.read_bytes().splitlines(keepends=True)
    assert after[:2] == before[:2]
    kinds = [json.loads(line)["kind"] for line in after]
    assert kinds == ["evaluation"] * 4 + ["end"]
    old, new = ([judged(json.loads(line)) for line in lines] for lines in (before, after))
    assert new == old
    # One candidate is the base model itself.
    assert new[0]["eval_distance_to_base"] == 0
    assert new[3]["eval_distance_to_base"] != 0


def judged(record: dict) -> dict:
    return {key: value for key, value in record.items() if key.startswith("eval_")}


def test_guided_sampling_follows_the_reward_more_at_a_larger_scale(model, folder):
    (folder / "protocol.yaml").write_text("budget: 240\nmethods: {guided: {sweep: [2, 8]}}\n")
    assert main(arguments(model, "--protocol", "protocol.yaml", *IN_PROCESS)) == 0
    found = evaluations(folder / "out" / "runs" / "guided" / "seed-0")
    assert [record["strength"] for record in found] == [2.0, 8.0]
    # Four guided steps of each image.
    assert [record["spent_unet_evaluations"] for record in found] == [8.0, 8.0]
    low, high = (record["eval_proxy_reward"] for record in found)
    assert low < high
    assert {record["better"]["distance_to_base"] for record in found} == {"lower"}
    near, far = (record["eval_distance_to_base"] for record in found)
    assert 0 < near < far


def processes(module: str = "submitit") -> list[psutil.Process]:
    """Those of submitit's processes below this one that run a module whose name begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word.startswith(module) for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_ctrl_c_saves_the_runs_under_way_and_leaves_no_process(model, folder, capsys):
    run = folder / "out" / "runs" / "sqdf" / "seed-0"

    def ask() -> None:
        wait_for(lambda: len(evaluations(run)) >= 2)
        # A terminal's Ctrl-C is for every process in front.
        for process in processes():
            process.send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(SystemExit) as stop:
        main(arguments(model, "--methods", "sqdf", "--seeds", "0"))
    asking.join()
    assert stop.value.code == 130
    assert "Continue with: sqdf-fast compare --resume out" in capsys.readouterr().err
    assert unlocked(run.with_name(".seed-0.lock"))
    assert not is_finished(run)
    assert processes() == []
    assert not (folder / "out" / ".submitit").exists()
    # The state of the step that was under way, beyond the last evaluation's.
    assert checkpointed(run)
    saved = read_checkpoint(checkpoints(run / "checkpoints")[-1])[1]
    assert saved["step"] == read_metrics(run / "metrics.jsonl")[-1]["step"]


def test_ctrl_c_stops_a_comparison_in_this_process(model, folder, capsys):
    (folder / "my_rewards.py").write_text(
        "import os, signal\n"
        "def slow_brightness(images, prompts):\n"
        "    if images.requires_grad:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(arguments(model, "--methods", "sqdf", "--seeds", "0,1", *IN_PROCESS))
    assert stop.value.code == 130
    assert checkpointed(folder / "out" / "runs" / "sqdf" / "seed-0")
    assert not (folder / "out" / "runs" / "sqdf" / "seed-1").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_says_so(model, folder, capsys):
    def kill() -> None:
        wait_for(lambda: processes("submitit.core._submit"))
        # All of them: one may be a child of the run that is about to become another program.
        for process in processes("submitit.core._submit"):
            process.kill()

    killing = threading.Thread(target=kill)
    killing.start()
    assert main(arguments(model, "--methods", "sqdf", "--seeds", "0")) == 1
    killing.join()
    log = Path("out") / "runs" / "sqdf" / "seed-0.log"
    said = f"1 run failed; sqdf seed 0: its process was killed, perhaps for lack of memory; see {log}."
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_preempted_job_of_a_cluster_continues(model, folder, capsys, monkeypatch):
    write_commands(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    run = folder / "out" / "runs" / "sqdf" / "seed-0"

    def preempt() -> None:
        wait_for(lambda: len(checkpointed(run)) >= 2)
        (job,) = [found for found in psutil.process_iter() if runs_in(found, folder / "out" / ".submitit")]
        job.send_signal(signal.SIGUSR2)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    command = arguments(model, "--methods", "sqdf", "--seeds", "0", "--launcher", "slurm", "--slurm", "partition=gpu")
    assert main(command) == 0
    preempting.join()
    assert (folder / "requeued").read_text() == "requeue 7\nrequeue 7\n"
    assert is_finished(run)
    steps = [record["step"] for record in evaluations(run)]
    assert len(steps) >= 5
    assert steps == sorted(set(steps))
    assert "At equal proxy reward" in capsys.readouterr().out


def runs_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process is one that Slurm started for the comparison of a folder."""
    try:
        return process.cmdline()[-2:] == ["submitit.core._submit", str(folder)]
    except psutil.Error:
        return False


def test_a_run_that_fails_does_not_end_the_others(model, folder, capsys):
    (folder / "my_rewards.py").write_text(
        "import os\n"
        "def brightness(images, prompts):\n"
        "    if images.requires_grad and os.path.exists('broken'):\n"
        "        print('the lamp flickers')\n"
        "        raise ValueError('no more light')\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    (folder / "broken").touch()
    command = arguments(model, "--methods", "sqdf", "--seeds", "0,1", *IN_PROCESS)
    command[command.index("my_rewards:slow_brightness")] = "my_rewards:brightness"
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "2 runs failed; sqdf seed 0: " in captured.err
    assert "Try them again with: sqdf-fast compare --resume out" in captured.err
    assert "no more light" in captured.err
    assert "failed: " in captured.out

    # A later report says it again, but not of a run that was stopped and whose log ends with its progress.
    log = folder / "out" / "runs" / "sqdf" / "seed-1.log"
    log.write_text("step 1/2 \u00b7 reward 0.5 \u00b7 0:01 left\n")
    (run,) = Comparison(stored_protocol(folder / "out"), folder / "out").report().runs
    assert run.unfinished[0].startswith("failed: ")
    assert "no more light" in run.unfinished[0]
    assert run.unfinished[1] == "interrupted or running"
    (folder / "broken").unlink()
    assert main(["compare", "--resume", "out", *IN_PROCESS]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "sqfd"], "method 'sqfd' is unknown; did you mean 'sqdf'"),
        (["--budget", "much"], "invalid budget 'much'"),
        (["--seeds", "a"], "invalid --seeds 'a': expected comma-separated whole numbers"),
        (["--ablate", "beta"], "'beta' is unknown; allowed: gamma"),
        (["--set", "objective.alpah=1"], "'objective.alpah' is unknown"),
        (["--set", "steps=5"], "settings.steps is decided by the comparison"),
        (["--protocol", "gone.yaml"], "protocol gone.yaml: cannot be read"),
        (["--resume", "out"], "leave out everything but --jobs, --launcher and --slurm"),
        (["--output", "full"], "full exists and is not a comparison"),
        (["--reward", "tast"], "reward 'tast' is unknown; did you mean 'taste'"),
        (["--prompts", "gone.txt"], "prompts 'gone.txt': neither a file nor a named set"),
    ],
)
def test_bad_input_is_one_line(model, folder, capsys, more, said):
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    assert main(arguments(model, *more)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (folder / "out").exists()
