"""A reward of the user's own that is wrong, from the command line: one line, exit status 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import write_pipeline

from sqdf_fast.cli import main

REWARDS = """
def brightness(images):
    return images.mean(dim=(1, 2, 3))

def shape(images, prompts):
    return brightness(images)[:, None]

def dtype(images, prompts):
    return (brightness(images) * 255).int()

def device(images, prompts):
    return brightness(images).to("meta")

def nan(images, prompts):
    return (brightness(images) - 2).sqrt()

def detached(images, prompts):
    return brightness(images.detach())

def raises(images, prompts):
    return {"brightness": brightness(images)}["Brightness"]
"""
SAID = {
    "shape": "returned shape [",
    "dtype": "returned torch.int32; return floating-point scores",
    "device": "returned scores on meta for images on cpu",
    "nan": "returned nan for the prompt",
    "detached": "returned scores that are detached from the images",
    "raises": "raised KeyError",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("wrong")
    write_pipeline(found / "tiny")
    (found / "wrong_rewards.py").write_text(REWARDS)
    (found / "prompts.txt").write_text("a red star\n")
    return found


@pytest.mark.parametrize("way", SAID)
def test_each_way_is_one_line_and_status_2(folder, way, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    arguments = ["--model", "tiny", "--reward", f"wrong_rewards:{way}", "--prompts", "prompts.txt", "--output", "run"]
    settings = ["objective.lookahead=tweedie", "sampling.num_inference_steps=4", "evaluation.num_prompts=1"]
    status = main(["train", *arguments, *(part for setting in settings for part in ("--set", setting))])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sqdf-fast:")]
    assert status == 2
    assert len(errors) == 1
    assert f"reward 'wrong_rewards:{way}' {SAID[way]}" in errors[0]
    assert not (folder / "run").exists()
