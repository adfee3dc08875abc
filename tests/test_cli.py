from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.tiny import write_pipeline

from sqdf_fast.cli import main
from sqdf_fast.runs import read_metrics

SMALL = [
    *("--reward", "warmth", "--prompts", "prompts.txt", "--steps", "2"),
    *(
        "--set",
        "objective.lookahead=tweedie",
        "--set",
        "sampling.num_inference_steps=4",
        "--set",
        "sampling.batch_size=4",
    ),
    *("--set", "optimizer.batch_size=2", "--set", "execution.micro_batch=2", "--set", "replay.refill=2"),
    *("--set", "evaluation.num_prompts=2", "--set", "evaluation.images_per_prompt=2"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("a red star\na blue ring\n")
    before = os.getcwd()
    os.chdir(folder)
    try:
        arguments = [*SMALL, "--set", f"evaluation.prompts={folder / 'prompts.txt'}"]
        assert main(["train", "--model", str(model), *arguments, "--output", "run"]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line that a bad call prints; nothing on standard output, exit status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("No CUDA GPU")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("sqdf-fast: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "shapse"], "'shapes'"),
        (["--reward", "tast"], "taste"),
        (["--preset", "esthetic"], "aesthetic"),
        (["--set", "objective.alhpa=1"], "objective.alpha"),
        (["--alpha", "-1"], "objective.alpha = -1"),
        (["--alpha", "two"], "--alpha"),
        (["--gamma", "0"], "objective.gamma"),
        (["--gamma", "1.5"], "objective.gamma"),
        (["--set", "sampling.eta=0"], "sampling.eta"),
        (["--steps", "0"], "steps = 0"),
        (["--set", "sampling.num_inference_steps=0"], "num_inference_steps"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--prompts", "empty.txt"], "empty.txt"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--device", "toaster"], "toaster"),
        (["--resume", "absent"], "absent"),
        (["--resume", "runs/x", "--steps", "3"], "--steps"),
        (["--colour"], "--colour"),
        (["--set", "algorithm=ddpo"], "objective.lookahead has no effect with algorithm = ddpo (only with sqdf)"),
        (["--set", "ddpo.clip_range=1"], "ddpo.clip_range has no effect with algorithm = sqdf (only with ddpo)"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(model, folder, capsys, arguments, said):
    (folder / "empty.txt").write_text("\n\n")
    given = [] if "--resume" in arguments else ["--model", str(model), *SMALL, "--output", "out"]
    assert said in refused(capsys, "train", *given, *arguments)
    assert sorted(os.listdir(folder)) == ["empty.txt", "prompts.txt"]


def test_an_existing_run_folder_is_refused_before_anything_is_loaded(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("precious")
    assert "--resume out" in refused(capsys, "train", "--model", "absent/absent", "--output", "out")
    assert os.listdir(folder / "out") == ["mine"]


def test_an_unwritable_place(model, folder, capsys):
    (folder / "file").write_text("")
    assert "cannot be written" in refused(capsys, "train", "--model", str(model), *SMALL, "--output", "file/run")


@pytest.mark.slow
def test_a_disk_that_fills_up_during_the_run_keeps_what_was_saved(model, folder):
    # The kernel refuses files beyond this size, as a full disk does: the metrics still fit, the checkpoint does not.
    script = f"""
import resource, sys
from sqdf_fast.cli import main
arguments = {["train", "--model", str(model), *SMALL, "--output", "run"]!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(arguments))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("sqdf-fast: ")
    assert "cannot be written" in line
    assert "Traceback" not in done.stderr
    assert [entry["step"] for entry in read_metrics(folder / "run" / "metrics.jsonl") if entry["kind"] == "step"] == [
        1,
        2,
    ]
    assert not list((folder / "run" / "checkpoints").glob("*"))


def test_a_place_one_may_not_even_look_into(model, folder, capsys, monkeypatch):
    # Root may look everywhere: the refusal is made here.
    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "Permission denied" in refused(capsys, "train", "--model", str(model), *SMALL, "--output", "locked")


def test_default_run_folders_are_numbered(model, folder):
    for _ in range(2):
        assert main(["train", "--model", str(model), *SMALL]) == 0
    assert sorted(path.name[-4:] for path in (folder / "runs").iterdir()) == ["-001", "-002"]


def test_sample_draws_a_labelled_grid_from_the_tuned_and_the_base_model(run, folder, capsys):
    assert main(["sample", str(run), "a red star", "a ring", "-n", "2", "--output", "tuned.png"]) == 0
    assert main(["sample", str(run), "a red star", "a ring", "-n", "2", "--base", "--output", "base.png"]) == 0
    assert main(["sample", str(run), "a red star", "a ring", "-n", "2", "--output", "again.png"]) == 0
    tuned, base, again = (Image.open(folder / f"{name}.png").tobytes() for name in ("tuned", "base", "again"))
    assert tuned == again
    assert tuned != base
    assert "tuned.png" in capsys.readouterr().out


def test_evaluate_prints_both_models(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    scores = table["scores"]
    assert scores["base"]["eval_proxy_reward"] != scores["run"]["eval_proxy_reward"]
    assert scores["base"]["eval_diversity"] > 0
    assert main(["evaluate", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["base", "run"]
    assert any(line.startswith("proxy reward") for line in lines)


def test_report_can_be_written_again(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [["sample", "absent", "a ring"], ["evaluate", "absent"], ["report", "absent"]])
def test_commands_on_no_run(capsys, command):
    assert "absent" in refused(capsys, *command)


def test_evaluate_with_prompts_of_ones_own(run, folder, capsys):
    (folder / "mine.txt").write_text("a ring\n")
    assert main(["evaluate", str(run), "--prompts", "mine.txt", "--images", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["run"]["eval_diversity"] > 0


def test_doctor_names_versions_and_implementations(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said
    assert "denoise_step" in said


@pytest.mark.parametrize(
    "command", ["train", "plan", "sample", "evaluate", "rewards", "compare", "report", "distill", "doctor"]
)
def test_every_command_explains_itself(capsys, command):
    assert main([command, "--help"]) == 0
    assert "Usage: sqdf-fast" in capsys.readouterr().out


def test_settings_can_be_listed(capsys):
    assert main(["train", "--help-settings"]) == 0
    assert "objective.gamma" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "--model", "shapes", "--set", "steps=0"]])
def test_help_and_mistakes_in_settings_do_not_wait_for_heavy_libraries(arguments):
    heavy = {"torch", "matplotlib", "jinja2"}
    code = f"import sys; from sqdf_fast.cli import main; main({arguments}); sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_old_key_is_one_line_on_standard_error(folder):
    arguments = ["train", "--model", "shapes", "--set", "execution.recompute=[network]", "--set", "steps=0"]
    done = subprocess.run([sys.executable, "-m", "sqdf_fast.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "setting execution.recompute is now execution.gradient_checkpointing",
        "sqdf-fast: setting steps = 0 is not allowed: it must be greater than or equal to 1",
    ]


@pytest.mark.slow
def test_a_plan_is_printed_as_a_table_and_as_json(capsys, monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    arguments = ["plan", "--model", "shapes", "--reward", "taste", "--vram", "2G", "--gpu", "RTX 3060"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "policy vjp" in table or "backward" in table
    assert "RTX 3060" in table
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    expected = {"fits", "peak_gib", "reserve_gib", "executor", "micro_batch", "settings", "stages"}
    assert expected | {"flops_per_step", "predicted_seconds"} <= plan.keys()
    assert plan["fits"]
    assert plan["peak_gib"] + plan["reserve_gib"] <= 2
    # What the user sets stays as it is.
    assert main([*arguments, "--json", "--set", "execution.decode_images=5", "--set", "execution.executor=staged"]) == 0
    kept = json.loads(capsys.readouterr().out)["settings"]
    assert (kept["execution.decode_images"], kept["execution.executor"]) == (5, "staged")
    assert main([*arguments[:-3], "0.61G", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "--model", "sd15", "--vram", "much"],
            "invalid --vram 'much': expected a size such as 24G, 8GiB or 80%",
        ),
        (["plan", "--model", "sd15", "--vram", "80%"], "no GPU to take a share of"),
        (["plan", "--model", "nothing/here", "--vram", "8G"], "architecture of model"),
        (["plan", "--model", "shapes", "--reward", "jpeg", "--vram", "8G"], "reward"),
        (["train", "--model", "shapes", "--vram", "-1G"], "expected a size such as"),
    ],
)
def test_bad_plans_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)
