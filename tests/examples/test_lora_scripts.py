"""A plain LoRA script, and the same script with the SQDF loss in place of the mean squared error."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.tiny import write_pipeline
from torch.nn.functional import mse_loss

from sqdf_fast import DenoisingSchedule
from sqdf_fast.shapes import load_taste
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import render

ROOT = Path(__file__).parents[2]
SCRIPTS = ("lora_mse", "lora_sqdf")


def script_diff() -> list[str]:
    paths = [f"examples/{name}.py" for name in SCRIPTS]
    before, after = ((ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True) for path in paths)
    return list(difflib.unified_diff(before, after, *paths))


def test_fewer_than_twenty_lines_are_added():
    changes = [line[0] for line in script_diff()[2:]]
    assert 0 < changes.count("-") <= changes.count("+") < 20


def test_the_page_shows_the_real_diff_and_counts_it():
    page = (ROOT / "docs" / "use_only_the_loss.md").read_text(encoding="utf-8")
    changes = [line[0] for line in script_diff()[2:]]
    assert f"{changes.count('+')} lines added, {changes.count('-')} removed:" in page
    assert f"```diff\n{''.join(script_diff())}```\n" in page


def negatives(folder: Path) -> Path:
    """Four pictures that the embedded model has never seen the like of, and their captions."""
    prompts = ["a red star", "a blue ring", "a large heart", "a small green cross"]
    pictures = render(attributes_for(prompts, np.random.default_rng(5)))
    for number, picture in enumerate(pictures):
        levels = ((1 - picture) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(levels).resize((80, 80)).save(folder / f"{number}.png")
    rows = [json.dumps({"file_name": f"{number}.png", "text": prompt}) for number, prompt in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@torch.no_grad()
def noise_error(pipe, data) -> float:
    """Mean squared error of the noise on every picture of a folder at ten levels, the same noise each time."""
    generator = torch.Generator().manual_seed(2)
    pixels, captions = torch.stack([picture for picture, _ in data]).repeat(10, 1, 1, 1), [text for _, text in data]
    latents = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.arange(50, 1000, 100).repeat_interleave(len(data))
    states, _ = pipe.encode_prompt(captions * 10, "cpu", 1, do_classifier_free_guidance=False)
    output = pipe.unet(pipe.scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
    return mse_loss(output, noise).item()


@pytest.mark.slow
def test_mse_lowers_the_error_of_the_noise(load_example, load_pipeline, tmp_path, capsys):
    script, folder = load_example("lora_mse"), negatives(tmp_path)
    script.main(
        f"--train_data_dir {folder} --output_dir {tmp_path}/lora --max_train_steps 12 --train_batch_size 4 "
        "--learning_rate 3e-3 --rank 4".split()
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    base = load_pipeline()
    data = script.load_data(folder, base)
    assert [caption for _, caption in data][2:] == ["a large heart", "a small green cross"]
    assert {tuple(picture.shape) for picture, _ in data} == {(3, 64, 64)}
    assert noise_error(load_pipeline(tmp_path / "lora"), data) < 0.8 * noise_error(base, data)


@pytest.mark.slow
def test_sqdf_raises_the_reward(load_example, load_pipeline, mean_reward, tmp_path, capsys):
    load_example("lora_sqdf").main(f"--output_dir {tmp_path}/lora --max_train_steps 12 --train_batch_size 4".split())
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("reward ")]) == 12
    tuned = load_pipeline(tmp_path / "lora")
    assert tuned.get_active_adapters() == ["default_0"]
    assert mean_reward(tuned) > mean_reward(load_pipeline()) + 0.4


def test_sqdf_trains_on_what_it_means_to(load_example, load_pipeline, tmp_path, monkeypatch):
    """Every step written out with the untouched base model: state, reference, transition, look-ahead, reward."""
    script, calls = load_example("lora_sqdf"), []
    fused, base, prompt = script.sqdf_loss, load_pipeline(), "a red star"
    picture = torch.from_numpy(render(attributes_for([prompt], np.random.default_rng(5)))) * 2 - 1

    def record(x, policy, reference, schedule, index, reward, **options):
        result = fused(x, policy, reference, schedule, index, reward, **options)
        calls.append((x, policy.detach(), reference, index, options["noise"], result))
        return result

    class TwoIndices:
        @staticmethod
        def from_scheduler(scheduler, num_inference_steps):
            schedule = DenoisingSchedule.from_scheduler(scheduler, num_inference_steps)
            trainable = torch.isin(torch.arange(num_inference_steps), torch.tensor([3, 11]))
            return replace(schedule, trainable=trainable, _copies={})

    monkeypatch.setattr(script, "DenoisingSchedule", TwoIndices)
    monkeypatch.setattr(script, "sqdf_loss", record)
    monkeypatch.setattr(script, "load_data", lambda folder, pipe: [(picture[0], prompt)])
    script.main(f"--output_dir {tmp_path} --max_train_steps 3 --train_batch_size 8 --learning_rate 0.01".split())

    schedule = DenoisingSchedule.from_scheduler(script.DDPMScheduler.from_config(base.scheduler.config), 20)
    tables = schedule.to("cpu")
    states = base.encode_prompt([prompt] * 8, "cpu", 1, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        latents = base.vae.encode(picture).latents * base.vae.config.scaling_factor
        for x, policy, reference, index, z, result in calls:
            assert set(index.tolist()) == {3, 11}
            signal, noise = tables.levels[index].unbind(1)
            epsilon = (x - signal.view(-1, 1, 1, 1) * latents) / noise.view(-1, 1, 1, 1)
            assert epsilon.square().mean().item() == pytest.approx(1, abs=0.1)
            assert abs((epsilon * z).mean().item()) < 0.06
            torch.testing.assert_close(reference, base.unet(x, tables.timesteps[index], states).sample)
            p, q, sigma = (column.view(-1, 1, 1, 1) for column in tables.transition[index].unbind(1))
            x_prev = p * x + q * policy + sigma * z
            torch.testing.assert_close(result.x_prev, x_prev)
            kl = (q * (policy - reference) / sigma).square().mean(dim=(1, 2, 3))
            torch.testing.assert_close(result.kl, kl)
            a, b = (column.view(-1, 1, 1, 1) for column in tables.lookahead[index].unbind(1))
            x0 = a * x_prev + b * base.unet(x_prev, tables.lookahead_timesteps[index], states).sample
            images = (base.vae.decode(x0 / base.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            reward = load_taste()(images, [prompt] * 8)
            torch.testing.assert_close(result.reward, reward, rtol=1e-4, atol=1e-4)
            loss = (4 * kl - 0.9 ** (19 - index) * reward).mean()
            torch.testing.assert_close(result.loss.detach(), loss, rtol=1e-4, atol=1e-4)
    kls = [result.kl.max().item() for *_, result in calls]
    assert kls[0] == 0
    assert kls[2] > 1e-4


def test_saturated_pixels_pass_their_gradient(load_example, saturated_model, tmp_path, monkeypatch):
    script = load_example("lora_sqdf")
    monkeypatch.setattr(
        script.rewards, "load_reward", lambda name, device: lambda images, prompts: -images.mean((1, 2, 3))
    )
    script.main(
        f"--pretrained_model_name_or_path {saturated_model} --output_dir {tmp_path}/lora --max_train_steps 1 "
        "--train_batch_size 2".split()
    )
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    # B starts at 0: a zero gradient would leave it there.
    trained = [value for key, value in weights.items() if "lora_B" in key or "lora.up" in key]
    assert all(value.abs().max() > 0 for value in trained)


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_model(load_example, name, tmp_path):
    """A pipeline with an AutoencoderKL, which encodes to a distribution and has a scaling factor."""
    folder, model = negatives(tmp_path), write_pipeline(tmp_path / "tiny")
    load_example(name).main(
        f"--pretrained_model_name_or_path {model} --train_data_dir {folder} --output_dir {tmp_path}/lora --rank 2 "
        "--max_train_steps 2 --train_batch_size 3".split()
    )
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    trained = [value for key, value in weights.items() if "lora_B" in key or "lora.up" in key]
    assert len(trained) == len(weights) / 2 > 0
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in trained)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(load_example, name, capsys):
    with pytest.raises(SystemExit, match="0"):
        load_example(name).main(["--help"])
    shown = capsys.readouterr().out
    for option in ("--pretrained_model_name_or_path", "--train_data_dir", "--output_dir", "--max_train_steps"):
        assert option in shown
    assert ("--reward" in shown) == (name == "lora_sqdf")


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("lora_mse", "--pretrained_model_name_or_path /no/such/model", "/no/such/model"),
        ("lora_mse", "--train_data_dir /no/such/folder", "/no/such/folder/metadata.jsonl"),
        ("lora_mse", "--rank 0", "`r` should be a positive integer"),
        ("lora_mse", "--learning_rate -1", "Invalid learning rate: -1.0"),
        ("lora_sqdf", "--max_train_steps 0", "num_samples should be a positive integer"),
        ("lora_sqdf", "--reward tast", "reward 'tast' is unknown; did you mean 'taste'?"),
    ],
)
def test_a_bad_argument_is_one_clear_line(load_example, name, arguments, reason, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_example(name).main([*arguments.split(), "--output_dir", str(tmp_path / "lora")])
    said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(said) == 1
    assert reason in said[0]
    assert not (tmp_path / "lora").exists()
