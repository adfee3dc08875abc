"""SQDF on the consistency model itself, from the command line's flag to images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.direct_reward import settings

from sqdf_fast.backbone import Backbone
from sqdf_fast.commands.evaluate import evaluate_models
from sqdf_fast.commands.sample import draw
from sqdf_fast.config import make_config
from sqdf_fast.engine.loading import load_backbone
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.runs import read_metrics
from sqdf_fast.training.lifecycle import new_run

PROMPTS = ["a red star", "a blue ring"]


@pytest.fixture(scope="module")
def model(low_contrast_model) -> Path:
    return low_contrast_model


@pytest.fixture(scope="module")
def consistency_lora(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("consistency")
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float32)
    backbone = Backbone(family, rank=2, target_modules=("to_q", "conv1"))
    with torch.no_grad():
        for parameter in backbone.policy_parameters.values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(7))
    family.save_lora(folder, "policy")
    return folder


def config(model: Path, consistency_lora: Path, **changes):
    ours = {
        "consistency_lora": str(consistency_lora),
        "policy": {"base": "consistency"},
        "objective": {"lookahead": "consistency", "alpha": 0.1},
        "sampling": {"guidance_scale": 1.0},
        "optimizer": {"batch_size": 3, "lr": 1e-2},
        "replay": {"refill": 3, "capacity": 6, "steps_per_refill": 1},
        "evaluation": {"every": 0, "num_prompts": 2, "images_per_prompt": 2},
        "prompts": "prompts.txt",
        "reward": "brightness:brightness",
        "steps": 2,
    }
    return settings(model, "sqdf", **{**ours, **changes})


def test_a_run_trains_and_samples(model, consistency_lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("prompts.txt").write_text("a red star\na blue ring\n")
    Path("brightness.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    new_run(config(model, consistency_lora), tmp_path / "run")
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["kl_mean"] == 0 for line in steps] == [True, False]
    # Four steps without guidance; the last of them is no training state, the look-ahead is the consistency model's.
    assert [line["unet_evaluations"] for line in steps] == [3 * 4 + 3 * 5] * 2
    assert set(steps[0]["kl_by_index"]) <= {"0", "1", "2"}
    trained = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    assert not any("conv1" in name for name in trained)
    draw(tmp_path / "run", PROMPTS, number=1, seed=0, base=False, output=tmp_path / "tuned.png")
    draw(tmp_path / "run", PROMPTS, number=1, seed=0, base=True, output=tmp_path / "base.png")
    assert (tmp_path / "tuned.png").read_bytes() != (tmp_path / "base.png").read_bytes()
    scores = evaluate_models([str(tmp_path / "run")], settings={}, assignments={}, seed=0).scores
    assert scores["base"]["eval_proxy_reward"] != scores["run"]["eval_proxy_reward"]


def test_base_samples_are_multistep_consistency_sampling(model, consistency_lora):
    """Noise, estimate, noise again at the next level: written out with the consistency role."""
    settled = config(model, consistency_lora)
    backbone = load_backbone(settled)
    sampler = Runtime(settled, backbone).sampler
    seeds = sample_seeds(0, Stream.REFILL, 0, 2)
    found = sampler.sample(PROMPTS, seeds, role="reference").x0
    family, timesteps = backbone.family, [999, 759, 499, 259]
    alphas = family.scheduler.alphas_cumprod.double()
    x = philox_normal(derive_seeds(Stream.INITIAL, ids=seeds), (4, 8, 8), dtype=torch.float64)
    with torch.no_grad(), backbone.role("consistency"):
        for i, t in enumerate(timesteps):
            eps = backbone.predict(x, torch.tensor([t, t]), family.encode(PROMPTS))
            c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
            x = c_skip * x + c_out * (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
            if i < 3:
                z = philox_normal(derive_seeds(Stream.DENOISING, i, ids=seeds), (4, 8, 8), dtype=torch.float64)
                level = alphas[timesteps[i + 1]]
                x = level.sqrt() * x + (1 - level).sqrt() * z
    assert torch.allclose(found, x, rtol=1e-9, atol=1e-9)


def test_the_flag_brings_few_steps_without_guidance():
    flags = {"policy": {"base": "consistency"}}
    sampling = make_config("shapes", flags=flags).sampling
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (4, 1.0)
    eight = make_config("shapes", flags=flags, assignments={"sampling": {"num_inference_steps": 8}}).sampling
    assert (eight.num_inference_steps, eight.guidance_scale) == (8, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": {"guidance_scale": 4.0}}, r"set sampling\.guidance_scale=1\.0"),
        ({"objective": {"lookahead": "tweedie"}}, r"set objective\.lookahead=consistency"),
        ({"policy": {"kind": "full"}}, r"set policy\.kind=lora"),
        ({"vram": "24G"}, "--vram plans for policy.base = network"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, said):
    with pytest.raises(UserError, match=said) as error:
        make_config("shapes", assignments=changes, flags={"policy": {"base": "consistency"}})
    assert "\n" not in str(error.value)


def test_the_command_line_has_the_flag(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from sqdf_fast import cli
    from sqdf_fast.training import lifecycle

    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(lifecycle, "new_run", lambda config, *given: seen.append(config))
    arguments = ["train", "--model", "shapes", "--policy", "consistency"]
    assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0
    assert (seen[0].policy.base, seen[0].sampling.num_inference_steps) == ("consistency", 4)
