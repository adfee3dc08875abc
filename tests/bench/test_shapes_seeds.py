from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[2] / "bench" / "shapes_seeds.py"

TOY = [
    *("--set", "sampling.num_inference_steps=3", "--set", "evaluation.num_prompts=2"),
    *("--set", "evaluation.images_per_prompt=2", "--set", "replay.refill=2", "--set", "optimizer.batch_size=2"),
]


def test_one_row_a_seed_and_finished_runs_are_not_repeated(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--steps", "1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "table.md"), *TOY]
    assert main([*arguments, "--seeds", "0"]) == 0
    first = (tmp_path / "runs" / "seed-0" / "metrics.jsonl").read_bytes()
    assert main([*arguments, "--seeds", "0", "1"]) == 0
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["seed", "0", "1"]
    assert "4 pictures of 2 held-out prompts" in (tmp_path / "table.md").read_text()
    assert Image.open(tmp_path / "images" / "before_after.png").width > 300
    assert (tmp_path / "runs" / "seed-0" / "metrics.jsonl").read_bytes() == first


def test_bad_settings_are_one_line(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--runs", str(tmp_path), "--set", "objective.gamma=2", "--seeds", "0"]) == 2
    assert "objective.gamma" in capsys.readouterr().err
