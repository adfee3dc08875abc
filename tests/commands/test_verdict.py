from __future__ import annotations

import json

import pytest
import torch

from sqdf_fast.commands.verdict import SHOWN, Verdict
from sqdf_fast.errors import UserError


@pytest.fixture
def verdict():
    scores = {
        "base": {"eval_proxy_reward": 1.0, "eval_proxy_reward_low": 0.5, "eval_proxy_reward_high": 1.5},
        "run": {"eval_proxy_reward": 2.25, "eval_proxy_reward_low": 2.0, "eval_proxy_reward_high": 2.5},
    }
    scores["base"] |= {"eval_proxy_reward_std": 0.3, "eval_distance": None, "eval_unknown": None}
    scores["run"] |= {"eval_proxy_reward_std": 0.4, "eval_distance": 0.0123, "eval_unknown": None}
    images = {
        label: torch.full((4, 3, 8, 8), level) * torch.tensor([1.0, 0.5, 1, 0.5])[:, None, None, None]
        for label, level in (("base", 0.0), ("run", 1.0))
    }
    better = {"proxy_reward": "higher", "distance": "lower"}
    return Verdict("taste", ["a ring", "a ring", "a star", "a star"], 1, scores, better, images)


def test_table(verdict):
    assert verdict.as_text().splitlines() == [
        "                                base                   run",
        "proxy reward ↑  1.000 [0.500, 1.500]  2.250 [2.000, 2.500]",
        "distance ↓                         -                0.0123",
    ]


def test_json_has_everything_but_the_images(verdict):
    found = json.loads(json.dumps(verdict.as_dict()))
    assert found["scores"]["run"]["eval_distance"] == 0.0123
    assert (found["prompts"], found["pictures"], found["seed"]) == (["a ring", "a star"], 4, 1)
    assert found["better"]["distance"] == "lower"


def test_sheet_has_a_row_a_prompt_and_a_column_a_model(verdict):
    sheet = verdict.sheet()
    # The first image of each prompt: black for the base, white for the run.
    colours = [[sheet.getpixel((x, y)) for x in (266, 432)] for y in (101, 267)]
    assert colours == [[(0, 0, 0), (255, 255, 255)]] * 2


def test_sheet_shows_few_of_many_prompts(verdict):
    images = {"base": torch.zeros(40, 3, 4, 4)}
    many = Verdict("taste", [f"prompt {i}" for i in range(40)], 1, {"base": {}}, {}, images)
    few = Verdict("taste", [f"prompt {i}" for i in range(SHOWN)], 1, {"base": {}}, {}, {"base": images["base"][:SHOWN]})
    assert many.sheet().size == few.sheet().size


def test_page_is_one_file_with_table_and_images(verdict, tmp_path):
    verdict.save_page(tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "<title>run against base</title>" in page
    assert '<td class="figure">2.250<small>2.000 to 2.500</small></td>' in page
    assert "4 images of\n2 prompts" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page


def test_a_place_that_cannot_be_written(verdict, tmp_path):
    (tmp_path / "file").write_text("")
    for save in (verdict.save_sheet, verdict.save_page):
        with pytest.raises(UserError, match="file"):
            save(tmp_path / "file" / "evaluation.png")
