"""Families from configurations alone: the shipped ones have the published sizes."""

from __future__ import annotations

import shutil
from importlib.resources import files

import pytest
import torch
from support.tiny_families import WRITERS

from sqdf_fast.errors import UserError
from sqdf_fast.families import family_from_configs, known_model, load_family
from sqdf_fast.families.loading import KNOWN_MODELS

CPU, META = torch.device("cpu"), torch.device("meta")


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "network", "decoder"),
    [
        # stable-diffusion-v1-5, stable-diffusion-xl-base-1.0, stable-diffusion-3.5-medium and FLUX.1-dev. 3.5-medium's
        # published file counts its 384 x 384 position embeddings of 1,536 elements too: 2,469,663,936.
        ("sd15", 859_520_964, 49_490_179),
        ("sdxl", 2_567_463_684, 49_490_179),
        ("sd35-medium", 2_469_663_936 - 384 * 384 * 1536, 49_545_475),
        ("flux1-dev", 11_901_408_320, 49_545_475),
    ],
)
def test_known_models_have_the_published_sizes(model, network, decoder):
    family = family_from_configs(model, device=META, dtype=torch.bfloat16)
    assert parameters(family.network) == network
    assert parameters(family.vae.decoder) == decoder
    tensors = [*family.network.parameters(), *family.vae.parameters(), *family.network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in family.network.parameters())
    assert (family.device, family.dtype) == (META, torch.bfloat16)
    assert not family.text_encoders


@pytest.mark.parametrize(
    ("model", "resolution", "latent_shape", "conditioning"),
    [
        ("sd15", 512, (4, 64, 64), {"encoder_hidden_states": (2, 77, 768)}),
        (
            "sdxl",
            1024,
            (4, 128, 128),
            {"encoder_hidden_states": (2, 77, 2048), "text_embeds": (2, 1280), "time_ids": (2, 6)},
        ),
        (
            "sd35-medium",
            1024,
            (16, 128, 128),
            {"encoder_hidden_states": (2, 333, 4096), "pooled_projections": (2, 2048)},
        ),
        ("flux1-dev", 1024, (4096, 64), {"encoder_hidden_states": (2, 512, 4096), "pooled_projections": (2, 768)}),
    ],
)
def test_known_models_run_on_meta_tensors(model, resolution, latent_shape, conditioning):
    family = family_from_configs(model, device=META, dtype=torch.bfloat16)
    assert family.resolution == resolution
    assert family.latent_shape == latent_shape
    example = family.example_conditioning(2)
    assert {name: tuple(tensor.shape) for name, tensor in example.tensors.items()} == conditioning
    x = torch.empty(2, *latent_shape, device=META, dtype=torch.bfloat16)
    output = family.predict(family.network, x, torch.empty(2, device=META), example)
    assert output.shape == x.shape
    assert family.decode(x).shape == (2, 3, resolution, resolution)


def test_schedules_of_known_models():
    def schedule(model, steps=4):
        family = family_from_configs(model, device=META, dtype=torch.bfloat16)
        return family.schedule(steps, eta=family.defaults.eta)

    assert schedule("sd15").prediction == schedule("sdxl").prediction == "epsilon"
    # Published schedulers are "leading" with an offset of 1.
    assert schedule("sd15").timesteps.tolist() == schedule("sdxl").timesteps.tolist() == [751, 501, 251, 1]
    # Shift 3: s -> 3 s / (1 + 2 s).
    medium = schedule("sd35-medium", 2)
    assert medium.levels[0, 1] == 1
    assert medium.prediction == "flow"
    # 4,096 patches: mu = 1.15; s -> e^mu / (e^mu + 1 / s - 1).
    shifted = torch.tensor(1.15, dtype=torch.float64).exp()
    levels = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    assert torch.allclose(schedule("flux1-dev").levels[:, 1], shifted / (shifted + 1 / levels - 1), atol=1e-6)


def test_names_of_known_models():
    for short, hub_id in KNOWN_MODELS.items():
        folder = known_model(short)
        assert folder is not None
        assert known_model(hub_id) == folder
        assert folder.name == short
        # Part of the package, not of the source tree only.
        assert (files("sqdf_fast.families") / "configs" / short / "model_index.json").is_file()
    assert known_model("runwayml/stable-diffusion-v1-5") == known_model("sd15")
    assert known_model("somebody/something") is None
    assert known_model("..") is None
    assert known_model("") is None


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_folders_architecture_is_that_of_its_weights(models, name):
    path = str(models[name])
    resolution = 32 if name == "flux" else None
    built = family_from_configs(path, device=CPU, dtype=torch.float32, resolution=resolution)
    loaded = load_family(path, device=CPU, dtype=torch.float32, resolution=resolution)
    assert type(built) is type(loaded)
    assert built.latent_shape == loaded.latent_shape
    for part in ("network", "vae"):
        shapes = {key: value.shape for key, value in getattr(built, part).state_dict().items()}
        assert shapes == {key: value.shape for key, value in getattr(loaded, part).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *built.latent_shape, generator=generator)
    with torch.no_grad():
        output = built.predict(built.network, x, torch.full((2,), 500.0), loaded.encode(["a ring", "a star"]))
        assert output.isfinite().all()
        assert built.decode(x).isfinite().all()
    assert torch.equal(built.schedule(4, 1.0).transition, loaded.schedule(4, 1.0).transition)


def test_the_embedded_world_from_its_configuration():
    built = family_from_configs("shapes", device=META, dtype=torch.float32)
    loaded = load_family("shapes", device=CPU, dtype=torch.float32)
    assert parameters(built.network) == parameters(loaded.network)
    assert built.latent_shape == loaded.latent_shape


def refused(model):
    with pytest.raises(UserError) as error:
        family_from_configs(str(model), device=META, dtype=torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_faults_are_one_line(models, tmp_path):
    assert "allowed: 'shapes', 'sd15'" in refused("somebody/something")
    assert "model_index.json" in refused(tmp_path)
    folder = shutil.copytree(models["stable-diffusion-3"], tmp_path / "copy")
    (folder / "transformer" / "config.json").write_text("{}")
    assert "cannot be read" in refused(folder)
    (folder / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    assert "KolorsPipeline; allowed: StableDiffusionPipeline" in refused(folder)
