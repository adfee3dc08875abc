from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from sqdf_fast import cli
from sqdf_fast.config import make_config, read_config_file
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.catalogue import CATALOGUE
from sqdf_fast.rewards.weighted import options_of, parse_sum


def test_table(capsys):
    assert cli.main(["rewards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, rows = lines[0], dict(zip(CATALOGUE, lines[1:], strict=False))
    assert header.split() == ["reward", "scores", "parameters", "download", "input", "prompt", "gradient", "licence"]
    assert all(row.startswith(name) for name, row in rows.items())
    assert rows["pickscore"].split("  ")[-1].strip() == "code MIT; weights unknown"
    for cell in ("428 M", "3.51 GB", "384 px", "AGPL-3.0"):
        assert cell in rows["aesthetic-v2.5"]
    columns = [header.index(name) for name in ("prompt", "gradient", "licence")]
    cells = [[row[start:end].strip() for start, end in pairwise(columns)] for row in rows.values()]
    assert cells == [
        ["yes" if card.reads_prompt else "no", "yes" if card.differentiable else "no"] for card in CATALOGUE.values()
    ]
    assert "--set algorithm=ddpo" in lines[-1]


def test_json(capsys):
    assert cli.main(["rewards", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(CATALOGUE)
    assert found["jpeg"]["differentiable"] is False
    assert found["imagereward"] == {
        "address": "sqdf_fast.rewards.imagereward:ImageReward",
        "scores": "ImageReward v1.0, human preference",
        "parameters": 445_279_489,
        "download": 1.79,
        "side": 224,
        "reads_prompt": True,
        "licence": "Apache-2.0; BLIP BSD-3-Clause",
        "source": "github.com/THUDM/ImageReward; huggingface.co/THUDM/ImageReward",
        "differentiable": True,
    }


@pytest.mark.parametrize("name", ["jpeg", "taste", "warmth"])
def test_cards_agree_with_the_rewards(name):
    reward = load_reward(name)
    card = CATALOGUE[name]
    assert reward.name == name
    assert reward.differentiable == card.differentiable
    assert sum(parameter.numel() for parameter in reward.parameters()) == card.parameters


def test_documented_table_agrees():
    document = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = document.split("## What there is")[1].split("## Weights")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`"): row for row in rows}
    assert set(documented) == set(CATALOGUE)
    for name, row in documented.items():
        card = CATALOGUE[name]
        assert row[2] == ("yes" if card.reads_prompt else "no")
        assert row[3].startswith(f"{card.side} px" if card.side else "as it is")
        if card.parameters >= 1e6:
            assert row[4] == f"{card.parameters / 1e6:.0f} M"
            assert row[5] == f"{2 * card.parameters / 2**30:.2f} GiB"
            assert row[6].startswith(f"{card.download:.2f} GB")
        named = [licence for licence in ("AGPL-3.0", "Apache-2.0", "MIT", "BSD-3-Clause") if licence in card.licence]
        assert all(licence in row[7] for licence in named)
        assert bool(named) != (row[7] == "as the package")


def test_options_of_a_sum_in_a_configuration_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("reward: taste + clip*0.5\nreward_options: {clip.model: folder, clip.clamp: true}\n")
    config = make_config("shapes", file=read_config_file(path))
    parts = options_of(parse_sum(config.reward), config.reward_options)
    assert parts == [{}, {"model": "folder", "clamp": True}]
