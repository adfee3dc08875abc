from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support.tiny import write_pipeline

from sqdf_fast.cli import main
from sqdf_fast.commands import sample as inference


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, model) -> Path:
    monkeypatch.chdir(tmp_path)
    # A base model's own sampler takes 50 steps.
    make_config = inference.make_config
    few = {"sampling": {"num_inference_steps": 4, "guidance_scale": 2.0}}
    monkeypatch.setattr(inference, "make_config", lambda preset, flags: make_config(preset, flags={**flags, **few}))
    return tmp_path


def drawn(capsys, model: Path, *arguments: str) -> tuple[bytes, list[str]]:
    """The image of a base model, and what was said on standard output."""
    assert main(["sample", str(model), "a red star", "a ring", "-n", "1", *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    return Image.open(said[0]).tobytes(), said


def test_a_base_model_is_bettered_without_a_run(model, folder, capsys):
    plain, said = drawn(capsys, model)
    assert said == ["sample.png"]
    one, said = drawn(capsys, model, "--best-of", "1", "--reward", "warmth")
    assert one == plain
    assert said[1] == "network rows 16, of them with a gradient 0; images scored 2"
    best, said = drawn(capsys, model, "--best-of", "5", "--reward", "warmth")
    assert best != plain
    assert said[1] == "network rows 80, of them with a gradient 0; images scored 10"
    guided, said = drawn(capsys, model, "--guide-scale", "30", "--reward", "warmth", "--output", "guided.png")
    assert guided != plain
    assert said == ["guided.png", "network rows 16, of them with a gradient 16; images scored 8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--best-of", "2", "--guide-scale", "1"], "--best-of and --guide-scale are mutually exclusive"),
        (["--reward", "warmth"], "--reward warmth has no effect without --best-of N or --guide-scale S"),
        (["--guide-scale", "-1", "--reward", "warmth"], "give a number >= 0"),
        (["--guide-scale", "1", "--reward", "jpeg"], "no gradient"),
        (["--best-of", "2", "--reward", "nothing-of-the-kind"], "nothing-of-the-kind"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(model, capsys, arguments, said):
    assert main(["sample", str(model), "a ring", "-n", "1", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
