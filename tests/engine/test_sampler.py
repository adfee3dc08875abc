from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import write_pipeline

from sqdf_fast.backbone import Backbone
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.schedule import DenoisingSchedule

PROMPTS = ["a red star", "a blue ring", "a ring"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def sampler(model: Path, batch_size: int = 3, scale: float = 3.0) -> Sampler:
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    backbone = Backbone(family, rank=2)
    schedule = DenoisingSchedule.from_scheduler(family.scheduler, 4, 1.0)
    return Sampler(backbone, schedule, guidance_scale=scale, batch_size=batch_size)


def test_equals_the_diffusers_pipeline_on_the_same_noise(model):
    """x_0 of plain diffusers: its own DDIM step, eta 1, fed the noise of our seeds."""
    seeds = sample_seeds(0, Stream.EVALUATION, 0, 3)
    ours = sampler(model).sample(PROMPTS, seeds, role="reference").x0
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float64)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    states, empty = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    x = philox_normal(derive_seeds(Stream.INITIAL, ids=seeds), (4, 8, 8), dtype=torch.float64)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            uncond, cond = pipeline.unet(torch.cat([x, x]), t, torch.cat([empty, states])).sample.chunk(2)
            noise = philox_normal(derive_seeds(Stream.DENOISING, i, ids=seeds), (4, 8, 8), dtype=torch.float64)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, eta=1.0, variance_noise=noise).prev_sample
    # The scheduler holds its alphas in float32.
    assert torch.allclose(ours, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(model, batch_size):
    seeds = sample_seeds(0, Stream.REFILL, 0, 3)
    whole = sampler(model).sample(PROMPTS, seeds, keep_states=True)
    parts = sampler(model, batch_size).sample(PROMPTS, seeds, keep_states=True)
    assert torch.allclose(whole.x0, parts.x0, rtol=0, atol=1e-12)
    assert torch.allclose(whole.states, parts.states, rtol=0, atol=1e-12)


def test_states_are_those_at_the_trainable_indices(model):
    found = sampler(model)
    result = found.sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3), keep_states=True)
    assert result.states.shape == (3, int(found.schedule.trainable.sum()), 4, 8, 8)
    first = philox_normal(
        derive_seeds(Stream.INITIAL, ids=sample_seeds(0, Stream.REFILL, 0, 3)), (4, 8, 8), dtype=torch.float64
    )
    assert torch.equal(result.states[:, 0], first)


def test_progress_counts_network_calls(model):
    seen = []
    seeds = sample_seeds(0, Stream.REFILL, 0, 3)
    sampler(model, batch_size=2).sample(PROMPTS, seeds, on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_streams_do_not_share_noise():
    seeds = torch.cat([sample_seeds(seed, stream, step, 4) for seed in (0, 1) for stream in Stream for step in (0, 1)])
    assert len(seeds.unique()) == len(seeds)
