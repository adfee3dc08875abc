"""The commands that made the weights, at a size that shows they run and write what the package reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sqdf_fast.shapes.build.__main__ import main
from sqdf_fast.shapes.build.judge import fits
from sqdf_fast.shapes.build.unet import captions, draw_timesteps, make_scheduler
from sqdf_fast.shapes.judge import load_judge
from sqdf_fast.shapes.prompts import parse
from sqdf_fast.shapes.render import COLORS, SHAPES, SIZES, sample_attributes
from sqdf_fast.shapes.rewards import load_taste


def test_a_taste_is_made_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["taste", "--smoke", "--weights", str(tmp_path), "--work", str(tmp_path / "work")])
    assert "held-out correlation" in capsys.readouterr().out
    assert load_taste("taste", tmp_path)(torch.rand(2, 3, 64, 64), ["a circle"] * 2).shape == (2,)


@pytest.mark.slow
def test_every_part_is_made_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, work = tmp_path / "weights", tmp_path / "work"
    for part in ("vae", "unet", "judge", "taste", "taste-held-out", "sheet"):
        main([part, "--smoke", "--weights", str(weights), "--work", str(work)])
    printed = capsys.readouterr().out
    assert "PSNR on fresh renders" in printed
    assert "held-out correlation" in printed
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "pipeline")
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    images = torch.rand(2, 3, 64, 64)
    tastes = [load_taste(part, weights)(images, ["a circle"] * 2) for part in ("taste", "taste-held-out")]
    assert tastes[0].shape == tastes[1].shape == (2,)
    assert not torch.allclose(*tastes)
    assert load_judge(weights / "judge.safetensors").alignment(images, ["a circle"] * 2).shape == (2,)
    assert (work / "shapes_samples.png").stat().st_size > 10_000


def test_captions_say_what_the_image_shows() -> None:
    attributes = sample_attributes(300, np.random.default_rng(0))
    prompts = captions(attributes, np.random.default_rng(1))
    named = [parse(prompt) for prompt in prompts]
    for index, name in enumerate(named):
        assert name.shape == SHAPES[attributes.shape[index]]
        assert name.color in (None, list(COLORS)[attributes.color[index]])
        assert name.size is None or SIZES[name.size][0] <= attributes.size[index] <= SIZES[name.size][1]
    assert np.mean([name.color is not None for name in named]) == pytest.approx(0.8, abs=0.06)
    assert np.mean([name.size is not None for name in named]) == pytest.approx(0.5, abs=0.08)
    assert torch.diagonal(fits(attributes, prompts)).all()
    assert fits(attributes, prompts).float().mean() < 0.1


def test_timesteps_follow_the_density_of_the_loss_weight() -> None:
    torch.manual_seed(0)
    alphas = make_scheduler().alphas_cumprod
    drawn = torch.cat([draw_timesteps(alphas, 64) for _ in range(200)])
    weight = (1 / alphas).clamp(max=8)
    share = weight[500:].sum() / weight.sum()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert (drawn >= 500).float().mean() == pytest.approx(float(share), abs=0.01)
