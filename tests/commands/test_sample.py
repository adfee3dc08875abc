"""Sampling a finished run: where its weights are, how many images are decoded at once, and what memory costs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from support.tiny import write_pipeline

from sqdf_fast.commands.sample import draw
from sqdf_fast.compare.jobs import Job, TrainingFreeSpec
from sqdf_fast.compare.training_free import sample_training_free
from sqdf_fast.config import Config, make_config
from sqdf_fast.errors import UserError
from sqdf_fast.families.stable_diffusion import StableDiffusion
from sqdf_fast.runs import read_metrics
from sqdf_fast.training.lifecycle import new_run

PROMPTS = ["a red star", "a ring"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def config(model: Path, folder: Path, **execution) -> Config:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return make_config(
        file={
            "model": str(model),
            "reward": "warmth",
            "prompts": str(folder / "prompts.txt"),
            "steps": 1,
            "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 8},
            "objective": {"lookahead": "tweedie"},
            "optimizer": {"batch_size": 2},
            "replay": {"capacity": 2, "refill": 2},
            "evaluation": {"every": 0, "num_prompts": 2, "images_per_prompt": 2},
            "execution": execution,
        }
    )


@pytest.fixture
def on_device(monkeypatch) -> list[tuple[str, bool, bool]]:
    """For every call of network or decoder: which, and whether the weights of network and decoder are on the device."""
    seen = []

    def watched(name: str):
        called = getattr(StableDiffusion, name)

        def call(family: StableDiffusion, *given):
            groups = [family.network.parameters(), family.vae.decoder.parameters()]
            seen.append((name, *(all(tensor.numel() > 0 for tensor in group) for group in groups)))
            return called(family, *given)

        monkeypatch.setattr(StableDiffusion, name, call)

    watched("predict")
    watched("decode")
    return seen


OFFLOADED = {("predict", True, False), ("decode", False, True)}


def test_samples_of_an_offloaded_run_have_their_stages_weights_on_the_device(model, tmp_path, on_device):
    new_run(config(model, tmp_path, offload="staged"), tmp_path / "run")
    on_device.clear()
    draw(tmp_path / "run", PROMPTS, number=2, seed=0, base=False, output=tmp_path / "one.png")
    assert set(on_device) == OFFLOADED


def test_training_free_methods_have_their_stages_weights_on_the_device(model, tmp_path, on_device):
    job = Job("best-of-n", 0, config(model, tmp_path, offload="staged"), tmp_path / "free")
    sample_training_free(job, TrainingFreeSpec("best-of-n", (2.0,)), threading.Event())
    assert set(on_device) == OFFLOADED
    assert read_metrics(tmp_path / "free" / "metrics.jsonl")[-1]["kind"] == "end"


def out_of_memory_above(images: int, monkeypatch) -> list[int]:
    """Decoding more images than so many runs out of memory; how many were decoded in each call that did not."""
    decode, sizes = StableDiffusion.decode, []

    def failing(family, latents):
        if len(latents) > images:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(latents))
        return decode(family, latents)

    monkeypatch.setattr(StableDiffusion, "decode", failing)
    return sizes


def test_samples_are_decoded_a_few_at_a_time_and_fewer_when_memory_runs_out(model, tmp_path, monkeypatch):
    new_run(config(model, tmp_path, decode_images=4), tmp_path / "run")
    for limit, expected in ((8, [4, 2]), (2, [2, 2, 2])):
        with monkeypatch.context() as patched:
            sizes = out_of_memory_above(limit, patched)
            draw(tmp_path / "run", PROMPTS, number=3, seed=0, base=False, output=tmp_path / f"{limit}.png")
        assert sizes == expected
    one, two = (tmp_path / f"{limit}.png" for limit in (8, 2))
    assert one.read_bytes() == two.read_bytes()


def test_evaluation_images_that_do_not_fit_cost_the_joint_executor_nothing(model, tmp_path, monkeypatch):
    joint = {"executor": "joint", "micro_batch": 2, "decode_images": 4}
    out_of_memory_above(2, monkeypatch)
    new_run(config(model, tmp_path, **joint), tmp_path / "run")
    (step,) = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step")
    assert step["budget_event"] == "out of memory while decoding: decode_images 4 -> 2"


def test_an_image_that_never_fits_is_refused_in_one_line(model, tmp_path, monkeypatch):
    new_run(config(model, tmp_path), tmp_path / "run")
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError, match="while decoding: one image at a time does not fit"):
        draw(tmp_path / "run", PROMPTS, number=1, seed=0, base=False, output=tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
