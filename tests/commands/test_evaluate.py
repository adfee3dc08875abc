"""`sqdf-fast evaluate` on the embedded world: runs, LoRAs and base models side by side, few prompts and steps."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from sqdf_fast.cli import main
from sqdf_fast.commands.evaluate import find_targets
from sqdf_fast.commands.sample import with_lookahead
from sqdf_fast.config import make_config
from sqdf_fast.display.grid import GAP, NAME_WIDTH
from sqdf_fast.engine.loading import load_backbone
from sqdf_fast.errors import UserError
from sqdf_fast.runs.folder import RunFolder

SMALL = {
    "prompts": "prompts.txt",
    "sampling": {"num_inference_steps": 3},
    "evaluation": {"prompts": "shapes-held-out", "num_prompts": 3, "images_per_prompt": 2},
    "policy": {"rank": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As if trained: a LoRA far from the base model."""
    path = tmp_path_factory.mktemp("runs") / "tuned"
    config = make_config("shapes", flags=SMALL)
    folder = RunFolder.create(path, config)
    backbone = load_backbone(with_lookahead(config, "tweedie"))
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.policy_parameters.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    folder.policy(config).mkdir()
    backbone.save_policy(folder.policy(config))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_run_beside_its_base_model(run, here, capsys):
    page = here / "page.html"
    found = json.loads(evaluate(capsys, run, "--held-out", "warmth", "--html", page, "--json"))
    assert list(found["scores"]) == ["base", "tuned"]
    assert (found["reward"], found["pictures"], len(found["prompts"])) == ("taste", 6, 3)
    base, tuned = found["scores"].values()
    assert (base["eval_distance_to_base"], base["eval_distance_to_base_high"]) == (0, 0)
    assert tuned["eval_distance_to_base"] > 0.1
    assert tuned["eval_proxy_reward"] != base["eval_proxy_reward"]
    for scores in (base, tuned):
        assert scores["eval_held_out_warmth_low"] <= scores["eval_held_out_warmth"]
        assert 1 <= scores["eval_vendi"] <= 2
    # Three prompts, two models.
    width, height = Image.open(run / "evaluation.png").size
    assert (width, height > 3 * 160) == (NAME_WIDTH + GAP + 2 * (160 + GAP), True)
    assert "<title>tuned against base</title>" in page.read_text(encoding="utf-8")


def test_the_lora_of_a_run_is_judged_as_the_run_is(run, here, capsys):
    shutil.copy(run / "lora" / "pytorch_lora_weights.safetensors", here / "mine.safetensors")
    arguments = (run, run / "lora", here / "mine.safetensors", "shapes", "--model", "shapes")
    small = ("--set", "sampling.num_inference_steps=3", "--set", "policy.rank=2", "--json", "--output", "sheet.png")
    scores = json.loads(evaluate(capsys, *arguments, *small))["scores"]
    assert list(scores) == ["base", "tuned", "tuned/lora", f"{here.name}/mine.safetensors"]
    base, tuned, *loras = scores.values()
    assert loras == [tuned, tuned]
    assert base != tuned
    assert (here / "sheet.png").is_file()


def test_the_table_of_a_base_model(capsys, here):
    small = ("--images", "2", "--set", "evaluation.num_prompts=2", "--set", "sampling.num_inference_steps=2")
    lines = evaluate(capsys, "shapes", *small).splitlines()
    assert lines[0].split() == ["shapes"]
    assert any(line.startswith("distance to base ↓") and line.endswith("0.000 [0.000, 0.000]") for line in lines)
    assert lines[-1] == "evaluation.png"
    assert (here / "evaluation.png").is_file()


def test_targets_are_judged_as_the_first_run_is(run):
    targets = find_targets(["shapes", str(run)], {"evaluation": {"images_per_prompt": 5}}, {"dtype": "float64"})
    assert [(target.label, target.policy is None) for target in targets] == [("shapes", True), ("tuned", False)]
    for target in targets:
        assert target.config.sampling.num_inference_steps == 3
        assert (target.config.evaluation.num_prompts, target.config.evaluation.images_per_prompt) == (3, 5)
        assert target.config.dtype == "float64"


def test_the_base_model_is_first_and_once(run):
    assert [target.label for target in find_targets([str(run), "shapes", str(run)], {}, {})] == ["base", "tuned"]


def test_another_reward_leaves_the_options_of_the_first(tmp_path):
    config = make_config("shapes", flags={"reward": "mine:score", "reward_options": {"scale": 2}})
    folder = RunFolder.create(tmp_path / "run", config)
    folder.policy(config).mkdir()
    (folder.policy(config) / "pytorch_lora_weights.safetensors").write_bytes(b"")
    kept, changed = (
        find_targets([str(tmp_path / "run")], settings, {})[1].config for settings in ({}, {"reward": "warmth"})
    )
    assert (kept.reward, kept.reward_options) == ("mine:score", {"scale": 2})
    assert (changed.reward, changed.reward_options) == ("warmth", {})


def test_runs_of_the_same_name_are_told_apart(run, tmp_path):
    other = tmp_path / "elsewhere" / "tuned"
    shutil.copytree(run, other)
    assert [target.label for target in find_targets([str(run), str(other)], {}, {})] == ["base", str(run), str(other)]


def test_prompts_of_ones_own_are_all_used(run, here):
    (here / "mine.txt").write_text("a red ring\na blue ring\na ring\na star\n")
    settings = {"evaluation": {"prompts": "mine.txt"}}
    assert find_targets([str(run)], settings, {})[0].config.evaluation.num_prompts == 4
    fewer = find_targets([str(run)], settings, {"evaluation": {"num_prompts": 2}})
    assert fewer[0].config.evaluation.num_prompts == 2


def test_what_is_no_target_is_said_in_one_line(run, here):
    (here / "empty").mkdir()
    shutil.copy(run / "lora" / "pytorch_lora_weights.safetensors", here / "mine.safetensors")
    RunFolder.create(here / "fresh", make_config("shapes", flags=SMALL))
    for target, message in (
        ("empty", "empty is not a run .* a LoRA .* or a model"),
        ("absent", "absent is not a run"),
        (f"{run.parent}/absent", "absent is not a run"),
        ("empty/absent", "absent is not a run"),
        ("mine.safetensors", "outside a run folder: name its base model with --model"),
        ("fresh", "has no trained lora yet"),
    ):
        with pytest.raises(UserError, match=message):
            find_targets([target], {}, {})
    (owner,) = find_targets(["owner/name"], {}, {})
    assert (owner.config.model, owner.policy) == ("owner/name", None)
