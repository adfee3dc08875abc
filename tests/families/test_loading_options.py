from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from support.tiny_families import WRITERS

from sqdf_fast.config import make_config
from sqdf_fast.engine import loading
from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family, set_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def refused(model, **options):
    with pytest.raises(UserError) as error:
        load_family(str(model), device=CPU, dtype=torch.float32, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class LoadedError(Exception):
    pass


@pytest.fixture
def requested(monkeypatch):
    """What the pipeline would be loaded with; nothing is loaded."""
    options = {}

    def from_pretrained(source, **given):
        options.update(given, source=source)
        raise LoadedError

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    return options


@pytest.mark.parametrize(("name", "part"), [("stable-diffusion-xl", "unet"), ("flux", "transformer")])
def test_only_the_network_is_quantised(models, requested, name, part):
    options = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    with pytest.raises(LoadedError):
        load_family(str(models[name]), quantization="nf4", **options)
    mapping = requested.pop("quantization_config").quant_mapping
    assert list(mapping) == [part]
    assert mapping[part].load_in_4bit
    assert mapping[part].bnb_4bit_quant_type == "nf4"
    assert mapping[part].bnb_4bit_compute_dtype == torch.bfloat16
    with pytest.raises(LoadedError):
        load_family(str(models[name]), quantization="int8", **options)
    mapping = requested.pop("quantization_config").quant_mapping
    assert list(mapping) == [part]
    assert mapping[part].load_in_8bit
    with pytest.raises(LoadedError):
        load_family(str(models[name]), **options)
    assert "quantization_config" not in requested


def test_quantisation_without_cuda_is_refused_before_anything_is_loaded(models, requested):
    assert "needs a CUDA device" in refused(models["flux"], quantization="nf4")
    assert not requested


def processors(network) -> list:
    return [module.processor for module in network.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"])
def test_native_attention_of_unets_and_stable_diffusion_3_is_torchs(models, name):
    family = load_family(str(models[name]), device=CPU, dtype=torch.float32)
    set_attention(family, "native", CPU)
    # Processors of these classes call scaled_dot_product_attention and nothing else.
    assert {type(processor) for processor in processors(family.network)} <= {AttnProcessor2_0, JointAttnProcessor2_0}


def test_native_attention_of_flux_is_a_backend(models):
    family = load_family(str(models["flux"]), device=CPU, dtype=torch.float32)
    set_attention(family, "native", CPU)
    assert {processor._attention_backend for processor in processors(family.network)} == {"native"}


@pytest.mark.parametrize("offload", ["none", "staged"])
@pytest.mark.parametrize("name", WRITERS)
def test_xformers_reaches_every_attention_layer_wherever_the_weights_wait(models, monkeypatch, name, offload):
    switched, backends = [], []
    monkeypatch.setattr(
        Attention,
        "set_use_memory_efficient_attention_xformers",
        lambda layer, use: switched.append((id(layer), use)),
    )
    monkeypatch.setattr(ModelMixin, "set_attention_backend", lambda network, backend: backends.append(backend))
    # The run's device is a GPU that is not here: weights to be moved there stay.
    monkeypatch.setattr(loading, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *device, **options: module)
    monkeypatch.setattr(
        loading, "Backbone", lambda family, **options: SimpleNamespace(family=family, policy_parameters={})
    )
    config = make_config(
        "shapes",
        assignments={
            "model": str(models[name]),
            "dtype": "float32",
            "objective": {"lookahead": "tweedie"},
            "sampling": {"guidance_scale": 1},
            "execution": {"attention": "xformers", "offload": offload},
        },
    )
    family = loading.load_backbone(config).family
    assert family.device == CUDA
    assert backends == ["xformers"]
    layers = [module for module in family.network.modules() if isinstance(module, Attention)]
    assert switched == [(id(layer), True) for layer in layers]
    assert len(layers) == (0 if name == "flux" else len(processors(family.network)))
    with pytest.raises(UserError, match="runs on CUDA devices, this one is cpu"):
        set_attention(family, "xformers", CPU)


def test_short_names_stand_for_hub_ids(monkeypatch):
    asked = []

    def load_config(source):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    assert "model 'sdxl' has no readable model_index.json (offline)" in refused("sdxl")
    assert asked == ["stabilityai/stable-diffusion-xl-base-1.0"]
