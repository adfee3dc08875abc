from __future__ import annotations

import pytest
from PIL import Image

TOY = [
    *("--set", "sampling.num_inference_steps=3", "--set", "evaluation.num_prompts=2"),
    *("--set", "evaluation.images_per_prompt=2", "--set", "replay.refill=2", "--set", "optimizer.batch_size=2"),
]


@pytest.mark.slow
def test_one_row_a_seed_and_finished_runs_are_not_repeated(tmp_path, command):
    arguments = ["seeds", "--steps", "1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), *TOY]
    assert command(*arguments, "--seeds", "0") == 0
    first = (tmp_path / "runs" / "seed-0" / "metrics.jsonl").read_bytes()
    assert command(*arguments, "--seeds", "0", "1") == 0
    page = (tmp_path / "shapes_results.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["seed", "0", "1"]
    assert "4 images of 2 held-out prompts" in " ".join(page.split())
    assert Image.open(tmp_path / "images" / "before_after.png").width > 300
    assert (tmp_path / "runs" / "seed-0" / "metrics.jsonl").read_bytes() == first


def test_bad_settings_are_one_line(tmp_path, command, capsys):
    assert command("seeds", "--runs", str(tmp_path), "--set", "objective.gamma=2", "--seeds", "0") == 2
    assert "objective.gamma" in capsys.readouterr().err
