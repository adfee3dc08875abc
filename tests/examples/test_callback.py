"""A pipeline's callback that collects states, and updates on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from support.tiny import write_pipeline

from sqdf_fast.shapes import load_taste

CALL = {"num_inference_steps": 5, "guidance_scale": 4.0, "eta": 1.0}
PROMPTS = ["a red star", "a blue ring", "a large heart"]


@pytest.mark.slow
def test_the_reward_rises(load_example, capsys):
    load_example("callback").main(["--rounds", "2", "--updates", "3"])
    shown = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(shown["reward after"]) > float(shown["reward before"]) + 0.4


def test_states_are_those_of_their_index(load_example, load_pipeline):
    """The noise that leads from each state to the next, by the schedule's own coefficients, is standard normal."""
    script, pipe = load_example("callback"), load_pipeline()
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    callback = script.SqdfCallback(pipe, latents, CALL)
    final = pipe(
        PROMPTS,
        latents=latents,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="latent",
        **CALL,
    ).images
    assert torch.equal(callback.states[0], latents)
    assert torch.equal(callback.states[5], final)
    conditional, unconditional = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    torch.testing.assert_close(callback.text, torch.cat([unconditional, conditional]))
    schedule = callback.schedule
    for i in range(5):
        x, x_prev = callback.states[i], callback.states[i + 1]
        with torch.no_grad():
            output = pipe.unet(torch.cat([x, x]), schedule.timesteps[i], callback.text).sample
        m = output[:3] + 4 * (output[3:] - output[:3])
        p, q, sigma = schedule.transition[i]
        if sigma == 0:
            torch.testing.assert_close(x_prev, p * x + q * m, rtol=1e-4, atol=1e-4)
        else:
            z = (x_prev - p * x - q * m) / sigma
            assert abs(z.mean().item()) < 0.1
            assert z.std().item() == pytest.approx(1, abs=0.1)


def test_an_update(load_example, load_pipeline, monkeypatch):
    """On trainable states alone, with the guided look-ahead of the base model; the LoRA alone is trained."""
    script, base, pipe, calls = load_example("callback"), load_pipeline(), load_pipeline(), []
    fused = script.sqdf_loss

    def record(x, policy, reference, schedule, index, reward, **options):
        calls.append((x, reference, index, fused(x, policy, reference, schedule, index, reward, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(script, "sqdf_loss", record)
    torch.manual_seed(0)
    parameters = script.add_lora(pipe, rank=2)
    callback = script.SqdfCallback(pipe, torch.randn(3, 4, 16, 16), CALL)
    tensors = ["latents", "prompt_embeds"]
    pipe(
        PROMPTS,
        latents=callback.states[0],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=tensors,
        **CALL,
    )
    callback.schedule = replace(callback.schedule, trainable=torch.tensor([False, True, False, True, False]))
    before = {name: parameter.clone() for name, parameter in pipe.unet.named_parameters()}
    callback.update(pipe, torch.optim.SGD(parameters, lr=1.0), script.rewards.load_reward("taste"), PROMPTS)

    ((x, reference, index, result),) = calls
    schedule = callback.schedule
    assert set(index.tolist()) <= {1, 3}
    with torch.no_grad():
        for b, i in enumerate(index.tolist()):
            assert torch.equal(x[b], callback.states[i][b])

        def network(x, timesteps):
            return base.unet(torch.cat([x, x]), timesteps[index].repeat(2), callback.text).sample

        torch.testing.assert_close(reference, network(x, schedule.timesteps))
        output = network(result.x_prev, schedule.lookahead_timesteps)
        m = output[:3] + 4 * (output[3:] - output[:3])
        a, b = (column.view(-1, 1, 1, 1) for column in schedule.lookahead[index].unbind(1))
        images = (base.vae.decode(a * result.x_prev + b * m).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(result.reward, load_taste()(images, PROMPTS), rtol=1e-4, atol=1e-4)
    assert torch.equal(result.kl, torch.zeros(3))
    changed = {name for name, parameter in pipe.unet.named_parameters() if not torch.equal(parameter, before[name])}
    # A LoRA starts with B = 0, so its first gradient is that of B, everywhere.
    assert changed == {name for name in before if ".lora_B." in name}
    assert all(parameter.requires_grad for parameter in parameters)


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def test_saturated_pixels_pass_their_gradient(load_example, saturated_model, monkeypatch):
    script, norms = load_example("callback"), []

    class Recorded(torch.optim.SGD):
        def step(self):
            norms.extend(parameter.grad.norm().item() for parameter in self.param_groups[0]["params"])

    monkeypatch.setattr(
        script.rewards, "load_reward", lambda name, device: lambda images, prompts: -images.mean((1, 2, 3))
    )
    monkeypatch.setattr(script, "AdamW", lambda parameters, lr: Recorded(parameters, lr))
    script.main(["--model", str(saturated_model), "--prompts", "a red star", "--rounds", "1", "--updates", "1"])
    # Of each LoRA's pair, B = 0 has a gradient at the first step and A has none.
    assert sum(norm > 0 for norm in norms) == len(norms) / 2 > 0


def test_a_model_whose_scheduler_cannot_be_read(load_example, tmp_path, monkeypatch, capsys):
    """Like SD1.5: an AutoencoderKL, a scheduler that takes earlier steps into account, prompts of its own."""
    script, folder = load_example("callback"), write_pipeline(tmp_path / "tiny")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipe.scheduler = PNDMScheduler(**settings, skip_prk_steps=True)
    pipe.save_pretrained(folder)
    loaded = {}

    def load_reward(name, device):
        loaded[name] = device
        return brightness

    seen = []
    update = script.SqdfCallback.update

    def record(callback, pipe, optimizer, reward, prompts):
        before = [parameter.clone() for parameter in pipe.unet.parameters() if parameter.requires_grad]
        update(callback, pipe, optimizer, reward, prompts)
        after = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
        changed = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        seen.append((reward, prompts, len(callback.states), type(pipe.scheduler).__name__, changed))

    monkeypatch.setattr(script.rewards, "load_reward", load_reward)
    monkeypatch.setattr(script.SqdfCallback, "update", record)
    prompts = ["a red star", "a blue ring"]
    script.main(
        ["--model", str(folder), "--reward", "bright", "--prompts", *prompts, "--rounds", "1", "--updates", "1"]
    )
    assert set(loaded) == {"bright"}
    assert seen == [(brightness, prompts, 11, "DDIMScheduler", True)]
    shown = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert 0 < float(shown["reward before"]) < 1


def test_help(load_example, capsys):
    with pytest.raises(SystemExit, match="0"):
        load_example("callback").main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--model", "--reward", "--prompts", "--rounds"))


def test_a_bad_argument_is_one_clear_line(load_example, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_example("callback").main(["--model", "/no/such/model"])
    said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(said) == 1
    assert "/no/such/model" in said[0]
