"""Every family against the diffusers pipeline that it takes apart."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from support.tiny_families import WRITERS

from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family
from sqdf_fast.families.stable_diffusion_xl import StableDiffusionXL

CPU = torch.device("cpu")
NAMES = sorted(WRITERS)
# Of the FLUX pipeline's latents: its default image has 4,096 patches.
RESOLUTION = {"flux": 32}
PROMPTS = ["a red star", "a ring", ""]
GUIDANCE = 4.0
STEPS = 5


def load(models, name, dtype=torch.float32):
    return load_family(str(models[name]), device=CPU, dtype=dtype, resolution=RESOLUTION.get(name))


def load_pipeline(models, name):
    kind = {"safety_checker": None} if name == "stable-diffusion" else {}
    pipeline = DiffusionPipeline.from_pretrained(models[name], **kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(family, count=2, seed=0):
    return torch.randn(count, *family.latent_shape, generator=torch.Generator().manual_seed(seed))


def guided(family, x, timestep, prompts):
    timesteps = torch.full((len(x),), float(timestep))
    conditional = family.predict(family.network, x, timesteps, family.encode(prompts))
    if not family.guided:
        return conditional
    unconditional = family.predict(family.network, x, timesteps, family.encode([""] * len(x)))
    return unconditional + GUIDANCE * (conditional - unconditional)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_trajectory_without_noise_is_the_pipelines_own(models, name):
    family, pipeline = load(models, name), load_pipeline(models, name)
    schedule = family.schedule(STEPS, eta=1.0)
    start = noise(family)
    x = start
    for timestep, (p, q) in zip(schedule.timesteps, schedule.ode.float(), strict=True):
        x = p * x + q * guided(family, x, timestep, PROMPTS[:2])
    if name.startswith("stable-diffusion") and name != "stable-diffusion-3":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline(
        PROMPTS[:2],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE if family.guided else 3.5,
        height=family.resolution,
        width=family.resolution,
        latents=start,
        output_type="latent",
    ).images
    assert expected.shape == x.shape
    assert (x - start).abs().max() > 0.1
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_decoded_images_are_the_pipelines_own(models, name):
    family, pipeline = load(models, name), load_pipeline(models, name)
    settings = {
        "num_inference_steps": 2,
        "height": family.resolution,
        "width": family.resolution,
        "latents": noise(family),
        "guidance_scale": 1.0,
    }
    latents = pipeline(PROMPTS[:2], output_type="latent", **settings).images
    images = pipeline(PROMPTS[:2], output_type="pt", **settings).images
    decoded = family.decode(latents)
    assert decoded.shape == (2, 3, family.resolution, family.resolution)
    assert decoded.std() > 0.01
    torch.testing.assert_close(decoded, torch.as_tensor(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sdxl_prompts(models):
    family, pipeline = load(models, "stable-diffusion-xl"), load_pipeline(models, "stable-diffusion-xl")
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    encoded = family.encode(PROMPTS).tensors
    torch.testing.assert_close(encoded["encoder_hidden_states"][:2], states)
    torch.testing.assert_close(encoded["text_embeds"][:2], pooled)
    # '' is no negative prompt at all: zeros, with the same sizes as every other row.
    assert not encoded["encoder_hidden_states"][2].any()
    assert not encoded["text_embeds"][2].any()
    assert encoded["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3


@torch.no_grad()
def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(models):
    pipeline = load_pipeline(models, "stable-diffusion-xl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    states, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    encoded = StableDiffusionXL(pipeline).encode([""]).tensors
    assert encoded["text_embeds"].any()
    torch.testing.assert_close(encoded["encoder_hidden_states"], states)
    torch.testing.assert_close(encoded["text_embeds"], pooled)


def test_sdxl_decodes_in_float32_where_float16_overflows(models):
    family = load(models, "stable-diffusion-xl", torch.float16)
    assert family.network.dtype == torch.float16
    assert family.vae.dtype == torch.float32
    assert load(models, "stable-diffusion-xl", torch.bfloat16).vae.dtype == torch.bfloat16
    with torch.no_grad():
        images = family.decode(noise(family).to(torch.float16))
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@torch.no_grad()
def test_sd3_prompts_with_and_without_t5(models, tmp_path):
    family, pipeline = load(models, "stable-diffusion-3"), load_pipeline(models, "stable-diffusion-3")
    settings = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, **settings)
    encoded = family.encode(PROMPTS).tensors
    assert encoded["encoder_hidden_states"].shape == (3, 8 + 256, 32)
    torch.testing.assert_close(encoded["encoder_hidden_states"], states)
    torch.testing.assert_close(encoded["pooled_projections"], pooled)

    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    without = load_family(str(tmp_path), device=CPU, dtype=torch.float32).encode(PROMPTS).tensors
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, **settings)
    torch.testing.assert_close(without["encoder_hidden_states"], states)
    assert not without["encoder_hidden_states"][:, 8:].any()
    assert without["encoder_hidden_states"][:, :8].any()
    torch.testing.assert_close(without["pooled_projections"], pooled)


@torch.no_grad()
def test_sd3_keeps_the_positions_of_one_resolution(models):
    family, pipeline = load(models, "stable-diffusion-3"), load_pipeline(models, "stable-diffusion-3")
    x = noise(family)
    assert pipeline.transformer.pos_embed.pos_embed.shape[1] == 12**2
    assert family.network.pos_embed.pos_embed.shape[1] == 4**2
    assert family.network.config.pos_embed_max_size == 4
    assert torch.equal(family.network.pos_embed(x), pipeline.transformer.pos_embed(x))


@torch.no_grad()
def test_flux_prompts_and_packing(models):
    family, pipeline = load(models, "flux"), load_pipeline(models, "flux")
    states, pooled, _ = pipeline.encode_prompt(PROMPTS)
    encoded = family.encode(PROMPTS).tensors
    assert encoded["encoder_hidden_states"].shape == (3, 512, 32)
    torch.testing.assert_close(encoded["encoder_hidden_states"], states)
    torch.testing.assert_close(encoded["pooled_projections"], pooled)
    assert family.latent_shape == (64, 16)
    image_ids = pipeline._prepare_latent_image_ids(2, 8, 8, CPU, torch.float32)
    assert torch.equal(family.image_ids(noise(family)), image_ids)


@torch.no_grad()
def test_flux_guidance_is_an_input_of_the_network(models):
    family = load(models, "flux")
    x, timesteps, conditioning = noise(family), torch.full((2,), 500.0), family.encode(PROMPTS[:2])
    weak = family.predict(family.network, x, timesteps, conditioning)
    family.embedded_guidance = 9.0
    assert (family.predict(family.network, x, timesteps, conditioning) - weak).abs().max() > 1e-4
    assert not family.guided


def test_flux_schedule_follows_the_length_of_the_sequence(models):
    path = str(models["flux"])
    small = load_family(path, device=CPU, dtype=torch.float32, resolution=32).schedule(4, 0.9)
    large = load_family(path, device=CPU, dtype=torch.float32, resolution=256).schedule(4, 0.9)
    # exp(mu) / (exp(mu) + 1 / s - 1) at s = 3/4; mu runs from 0.5 at 256 patches to 1.15 at 4096.
    for schedule, patches in ((small, 64), (large, 4096)):
        mu = torch.tensor(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256), dtype=torch.float64)
        expected = mu.exp() / (mu.exp() + 1 / 3)
        assert schedule.levels[1, 1].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_decode_and_network(models, name):
    family = load(models, name)
    x = (20 * noise(family, 1)).requires_grad_(True)
    (through_decoder,) = torch.autograd.grad(family.decode(x).sum(), x)
    assert (through_decoder != 0).float().mean() > 0.9
    output = family.predict(family.network, x, torch.full((1,), 500.0), family.encode(PROMPTS[:1]))
    (through_network,) = torch.autograd.grad(output.sum(), x)
    assert through_network.shape == x.shape
    assert through_network.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_lora_is_read_by_family_and_pipeline(models, name, tmp_path):
    family = load(models, name)
    family.network.add_adapter(LoraConfig(r=2, target_modules=list(family.lora_targets)), adapter_name="policy")
    generator = torch.Generator().manual_seed(0)
    for key, parameter in family.network.named_parameters():
        if ".policy." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    family.save_lora(tmp_path, "policy")
    x, timesteps, conditioning = noise(family), torch.full((2,), 500.0), family.encode(PROMPTS[:2])

    def output(network):
        with torch.no_grad():
            return family.predict(network, x, timesteps, conditioning)

    expected = output(family.network)
    again = load(models, name)
    assert (output(again.network) - expected).abs().max() > 1e-3
    again.load_lora(str(tmp_path), "policy")
    torch.testing.assert_close(output(again.network), expected)
    pipeline = load_pipeline(models, name)
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(output(getattr(pipeline, family.network_part)), expected)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_a_lora_in_the_format_of_the_published_lcm_loras(models, name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer, published = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", {}
    width = load(models, name).network.get_submodule(layer).weight.shape[0]
    key = f"lora_unet_{layer.replace('.', '_')}"
    published[f"{key}.lora_down.weight"] = torch.randn(2, width, generator=generator)
    published[f"{key}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
    published[f"{key}.alpha"] = torch.tensor(6.0)
    save_file(published, tmp_path / "pytorch_lora_weights.safetensors")
    family, plain = load(models, name), load(models, name)
    family.load_lora(str(tmp_path), "consistency")
    delta = 6 / 2 * published[f"{key}.lora_up.weight"] @ published[f"{key}.lora_down.weight"]
    plain.network.get_submodule(layer).weight.data += delta
    x, timesteps, conditioning = noise(family), torch.full((2,), 500.0), family.encode(PROMPTS[:2])
    with torch.no_grad():
        output = family.predict(family.network, x, timesteps, conditioning)
        expected = family.predict(plain.network, x, timesteps, conditioning)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_of_another_base_is_refused(models, name, tmp_path):
    other = load(models, "flux" if name != "flux" else "stable-diffusion")
    other.network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="policy")
    other.save_lora(tmp_path, "policy")
    with pytest.raises(UserError, match="made for this base") as error:
        load(models, name).load_lora(str(tmp_path), "policy")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_default_lora_targets_reach_every_attention_projection(models, name):
    family = load(models, name)
    family.network.add_adapter(LoraConfig(r=2, target_modules=list(family.lora_targets)), adapter_name="policy")
    reached = {key.rsplit(".lora_A", 1)[0] for key, _ in family.network.named_parameters() if ".lora_A." in key}
    attention = {
        f"{key}.{child}"
        for key, module in load(models, name).network.named_modules()
        if hasattr(module, "to_q")
        for child, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert reached == attention


@pytest.mark.parametrize("name", NAMES)
def test_blocks_worth_recomputing_exist_under_their_names(models, name):
    family = load(models, name)
    for part, module in (("network", family.network), ("decoder", family.vae.decoder)):
        found = {type(block).__name__ for block in module.modules()} & family.checkpointed_block_types[part]
        assert found >= family.checkpointed_block_types[part] - {"AutoencoderTinyBlock"}


@pytest.mark.parametrize("name", NAMES)
def test_example_conditioning_has_the_shapes_of_encoded_prompts(models, name):
    family = load(models, name, torch.bfloat16)
    example, encoded = family.example_conditioning(3).tensors, family.encode(PROMPTS).tensors
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        key: (value.shape, value.dtype) for key, value in encoded.items()
    }
    assert not any(value.any() for value in example.values())


@pytest.mark.parametrize("name", NAMES)
def test_released_text_encoders_leave_what_was_encoded(models, name):
    family = load(models, name)
    before = family.encode(PROMPTS[:1]).tensors
    family.release_text_encoders()
    assert not family.text_encoders
    after = family.encode(PROMPTS[:1]).tensors
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(UserError, match="a ring"):
        family.encode(["a ring"])


def test_a_text_encoder_that_does_not_fit_runs_where_it_is(models, monkeypatch):
    family = load(models, "flux")
    expected = family.encode(["a ring"]).tensors
    t5, moves = family.text_encoders[1], []

    def to(device):
        moves.append(device)
        if len(moves) == 1:
            raise torch.OutOfMemoryError("no room")
        return t5

    monkeypatch.setattr(t5, "to", to)
    again = family.encode_prompts(["a ring"]).tensors
    assert moves == [CPU, CPU, CPU]
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_many_prompts_are_encoded_a_few_at_a_time(models):
    family = load(models, "stable-diffusion")
    encode, sizes = family.encode_prompts, []
    family.encode_prompts = lambda prompts: sizes.append(len(prompts)) or encode(prompts)
    prompts = [f"a {'red ' * number}star" for number in range(70)]
    encoded = family.encode(prompts).tensors["encoder_hidden_states"]
    assert sizes == [32, 32, 6]
    assert torch.allclose(encoded[:3], encode(prompts[:3]).tensors["encoder_hidden_states"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs_to_float32_images(models, name):
    family = load(models, name, torch.bfloat16)
    x = noise(family).to(torch.bfloat16)
    with torch.no_grad():
        output = family.predict(family.network, x, torch.full((2,), 500.0), family.encode(PROMPTS[:2]))
        images = family.decode(x)
    assert output.dtype == torch.bfloat16
    assert output.shape == x.shape
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_a_resolution_that_does_not_fit_is_refused(models):
    with pytest.raises(UserError, match="multiple of 4"):
        load_family(str(models["flux"]), device=CPU, dtype=torch.float32, resolution=30)


def test_other_resolutions(models):
    family = load_family(str(models["stable-diffusion-xl"]), device=CPU, dtype=torch.float32, resolution=32)
    assert family.latent_shape == (4, 16, 16)
    assert family.encode(["a ring"]).tensors["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert family.decode(noise(family)).shape == (2, 3, 32, 32)


def test_consistency_loras_are_offered_to_networks_of_the_published_width_only(models):
    assert all(load(models, name).default_consistency_lora() is None for name in NAMES)
