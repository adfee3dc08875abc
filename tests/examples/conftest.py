"""The example scripts as modules, run in this process on one thread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sqdf_fast.shapes import HELD_OUT_PROMPTS, load_taste, pipeline_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def load_example():
    """name -> the module of examples/name.py, imported again on every call."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def load_pipeline():
    """The embedded pipeline as a user of plain diffusers loads it, with a LoRA folder or without."""

    def load(lora: Path | None = None) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder())
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(lora)
        return pipe

    return load


@pytest.fixture(scope="session")
def mean_reward():
    """Mean taste of one picture of eight held-out prompts, the same noise for every pipeline."""
    prompts = list(HELD_OUT_PROMPTS[:8])

    def measure(pipe: StableDiffusionPipeline) -> float:
        generator = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 10, "guidance_scale": 1.0, "eta": 1.0, "output_type": "pt"}
        images = pipe(prompts, generator=generator, **call).images
        return load_taste()(images, prompts).mean().item()

    return measure


@pytest.fixture
def saturated_model(tmp_path, load_pipeline) -> Path:
    """The embedded pipeline with a decoder that makes every pixel brighter than 1."""
    pipe = load_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.layers[-1].bias += 10
    pipe.save_pretrained(tmp_path / "saturated")
    return tmp_path / "saturated"
