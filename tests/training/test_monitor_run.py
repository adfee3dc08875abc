"""The monitor's actions in whole runs of the tiny world: the held-out reward is minus the trained one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.stopping import StopWhen

from sqdf_fast.config import Config, make_config
from sqdf_fast.errors import Interrupted
from sqdf_fast.runs import read_metrics, read_run
from sqdf_fast.training.lifecycle import continue_run, new_run

REWARDS = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def darkness(images, prompts):
    return -images.mean(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "monitored_rewards", raising=False)
    (tmp_path / "monitored_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na ring\n")
    return tmp_path


def config(model: Path, action: str, steps: int = 8, held_out: str = "darkness", **more: Any) -> Config:
    settings = {
        "model": str(model),
        "reward": "monitored_rewards:brightness",
        "prompts": "prompts.txt",
        "steps": steps,
        "checkpoint_every": 0,
        "sampling": {"num_inference_steps": 3, "guidance_scale": 1.0, "batch_size": 6},
        "objective": {"lookahead": "tweedie", "alpha": 0.0, "gamma": 1.0},
        "optimizer": {"batch_size": 4, "lr": 0.1},
        "execution": {"executor": "joint", "micro_batch": 4},
        "replay": {"capacity": 8, "refill": 4, "steps_per_refill": 2},
        "evaluation": {
            "every": 2,
            "num_prompts": 3,
            "images_per_prompt": 2,
            "grid": 1,
            "held_out": (f"monitored_rewards:{held_out}",),
        },
        "monitor": {"action": action},
    }
    return make_config(file={**settings, **more})


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in found]


def same(one: Path, two: Path) -> bool:
    """Whether two runs have the same LoRA for their result."""
    first, second = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (one, two))
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_restore_ends_the_run_with_the_weights_before_the_turn(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    new_run(config(model, "restore"), run)
    (alarm,) = records(run, "alarm")
    # Evaluated at 0, 2, 4, 6: the falls of the last two are beyond the intervals, that of the first is not.
    assert (alarm["step"], alarm["best_step"], alarm["judges"]) == (6, 2, ["held_out_monitored_rewards_darkness"])
    found = read_run(run)
    assert found.ended == "monitor"
    assert found.last_step == 6
    assert os.listdir(run / "best") == ["step_000002"]
    assert "holds the weights of step 2" in " ".join(capsys.readouterr().err.split())
    new_run(config(model, "off", steps=2), folder / "short")
    assert same(run, folder / "short")
    assert "its result holds the weights of step 2" in (run / "report.html").read_text(encoding="utf-8")
    # Going on with it finds the alarm in its records.
    continue_run(run)
    assert records(run, "alarm") == [alarm]
    assert [end["reason"] for end in records(run, "end")] == ["monitor"]
    assert read_run(run).last_step == 6
    assert same(run, folder / "short")


@pytest.mark.slow
def test_stop_ends_the_run_with_the_weights_that_it_has_and_off_says_nothing(model: Path, folder: Path) -> None:
    run = folder / "run"
    new_run(config(model, "stop"), run)
    assert read_run(run).ended == "monitor"
    assert [record["step"] for record in records(run, "evaluation")] == [0, 2, 4, 6]
    assert not (run / "best").exists()
    new_run(config(model, "off", steps=6), folder / "whole")
    assert same(run, folder / "whole")
    assert records(folder / "whole", "alarm") == []
    assert "Over-optimization" not in (folder / "whole" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_warn_goes_on_and_an_interruption_changes_nothing(model: Path, folder: Path) -> None:
    whole, broken = folder / "whole", folder / "broken"
    new_run(config(model, "warn"), whole)
    assert read_run(whole).ended == "steps"
    assert [record["step"] for record in records(whole, "evaluation")] == [0, 2, 4, 6, 8]
    # Said once, though it holds at step 8 as well.
    assert [alarm["step"] for alarm in records(whole, "alarm")] == [6]
    assert "Alarm at step 6" in (whole / "report.html").read_text(encoding="utf-8")
    with pytest.raises(Interrupted):
        new_run(config(model, "warn"), broken, StopWhen(lambda: len(records_so_far(broken)) >= 5))
    assert records(broken, "alarm") == []
    continue_run(broken)
    assert records(broken, "evaluation") == records(whole, "evaluation")
    assert records(broken, "alarm") == records(whole, "alarm")


def records_so_far(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [record for record in read_metrics(path) if record["kind"] == "step"] if path.exists() else []


def test_nothing_is_said_where_the_judge_rises_too(model: Path, folder: Path) -> None:
    run = folder / "run"
    new_run(config(model, "stop", held_out="brightness", steps=6), run)
    assert records(run, "alarm") == []
    assert read_run(run).ended == "steps"
    assert "No over-optimization detected." in (run / "report.html").read_text(encoding="utf-8")
