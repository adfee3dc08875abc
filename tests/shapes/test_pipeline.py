from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sqdf_fast.shapes import load_judge, pipeline_folder
from sqdf_fast.shapes.build.sheet import draw_samples
from sqdf_fast.shapes.render import render, sample_attributes

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pipeline_folder())


def test_plain_diffusers_loads_the_folder_in_float32(pipeline: StableDiffusionPipeline) -> None:
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("epsilon", "trailing")
    assert (config.clip_sample, config.thresholding, config.num_train_timesteps) == (False, False, 1000)


def test_everything_shipped_is_at_most_twelve_megabytes() -> None:
    files = [path for path in pipeline_folder().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    assert {path.suffix for path in files} <= {".safetensors", ".json"}


def test_the_autoencoder_keeps_the_image_and_its_latents_are_white(pipeline: StableDiffusionPipeline) -> None:
    images = torch.from_numpy(render(sample_attributes(32, np.random.default_rng(9)))) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latents
        made = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    ratio = -10 * torch.log10(((made - images) / 2).square().mean())
    assert ratio > 28
    assert latents.shape == (32, 4, 16, 16)
    assert latents.mean().abs() < 0.1
    assert latents.std() == pytest.approx(1.0, abs=0.1)


def test_samples_show_what_the_prompt_names() -> None:
    prompts = ["a red circle", "a large blue ring", "a green square", "a yellow triangle", "a black star"] * 2
    prompts += ["a pink cross", "a purple heart"] * 2
    images = draw_samples(pipeline_folder(), prompts, seed=1)
    again = draw_samples(pipeline_folder(), prompts[:2], seed=1, batch=2)
    accuracy = load_judge().attribute_accuracy(images, prompts)
    assert images.shape == (14, 3, 64, 64)
    assert again.shape == (2, 3, 64, 64)
    assert accuracy.color >= 0.9
    assert accuracy.shape >= 0.7
