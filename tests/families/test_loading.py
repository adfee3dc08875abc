from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family

CPU = torch.device("cpu")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_loaded_family_computes_what_the_pipeline_computes(model):
    family = load_family(str(model), device=CPU, dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    states, _ = pipeline.encode_prompt("a red star", CPU, 1, False)
    assert torch.allclose(family.encode(["a red star"]).tensors["encoder_hidden_states"], states)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.unet(x, 500, states).sample
        assert torch.allclose(
            family.predict(family.network, x, torch.tensor([500.0]), family.encode(["a red star"])), expected, atol=1e-6
        )
        decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(family.decode(x), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)
    assert family.latent_shape == (4, 8, 8)


def test_decoding_clips_but_lets_the_gradient_pass(model):
    family = load_family(str(model), device=CPU, dtype=torch.float32)
    x = (40 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    images = family.decode(x)
    assert images.min() == 0 or images.max() == 1
    clipped = (images == 0) | (images == 1)
    (grad,) = torch.autograd.grad(images[clipped].sum(), x)
    assert grad.abs().max() > 0


def test_each_prompt_is_encoded_once(model):
    family = load_family(str(model), device=CPU, dtype=torch.float32)
    calls = []
    encode = family.encode_prompts
    family.encode_prompts = lambda prompts: calls.append(list(prompts)) or encode(prompts)
    rows = family.encode(["a ring", "a star", "a ring"]).tensors["encoder_hidden_states"]
    family.encode(["a star", ""])
    assert [prompt for call in calls for prompt in call] == ["a ring", "a star", ""]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_weights_are_frozen_in_the_wanted_precision(model):
    family = load_family(str(model), device=CPU, dtype=torch.bfloat16)
    for module in (family.network, family.vae, *family.text_encoders):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_sampler_without_an_affine_step_becomes_ddim(copy):
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    PNDMScheduler.from_config(config, skip_prk_steps=True).save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    scheduler = load_family(str(copy), device=CPU, dtype=torch.float32).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert not scheduler.config.clip_sample
    assert scheduler.config.steps_offset == 1


def refused(model: str) -> str:
    with pytest.raises(UserError) as error:
        load_family(model, device=CPU, dtype=torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_faults_are_one_line(copy, tmp_path):
    assert "allowed: 'shapes'" in refused("shapse")
    assert "allowed: 'shapes'" in refused(str(tmp_path / "absent"))
    assert "model_index.json" in refused(str(tmp_path))
    text_encoder = copy / "text_encoder" / "model.safetensors"
    whole = text_encoder.read_bytes()
    text_encoder.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(str(copy))
    text_encoder.write_bytes(whole)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in refused(str(copy))
    shutil.rmtree(copy / "unet")
    assert "cannot be loaded" in refused(str(copy))
    (copy / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    assert "KolorsPipeline; allowed: StableDiffusionPipeline" in refused(str(copy))


def test_images_of_a_half_precision_model_are_float32(model):
    family = load_family(str(model), device=CPU, dtype=torch.bfloat16)
    assert family.decode(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_only_networks_of_sd1_width_are_offered_its_lcm_lora(model):
    assert load_family(str(model), device=CPU, dtype=torch.float32).default_consistency_lora() is None
