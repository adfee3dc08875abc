from __future__ import annotations

import json
from itertools import pairwise

import pytest

from sqdf_fast import cli
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.catalogue import CATALOGUE


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
