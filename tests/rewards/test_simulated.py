"""What the planner simulates: the rewards' own modules, without weights, on fake tensors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sqdf_fast.errors import UserError
from sqdf_fast.gradient_checkpointing import checkpoint_blocks
from sqdf_fast.rewards import architectures, available_rewards, load_reward, reward_from_config
from sqdf_fast.rewards.catalogue import CATALOGUE

# Image blocks, and text blocks where the text is read with the image.
BLOCKS = {"aesthetic": 24, "aesthetic-v2.5": 27, "clip": 24, "hpsv2": 32, "imagereward": 24 + 12, "pickscore": 32}
SIMULATED = tuple(name for name, card in CATALOGUE.items() if card.differentiable)


def faked(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with fake CPU tensors in place of its meta tensors."""
    with mode:
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                empty = torch.empty(value.shape, dtype=value.dtype)
                part.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            for name, value in part.named_buffers(recurse=False):
                part.register_buffer(name, torch.empty(value.shape, dtype=value.dtype), persistent=False)
    return module


# CLIP ViT-L/14's image tower with projection and ViT-H/14's; SigLIP so400m's image tower; BLIP as in ImageReward.pt,
# whose 446 666 465 numbers are these, two projections, 512 positions and the head's layers in place of their fold.
PARAMETERS = {
    "aesthetic": 303_966_208 + 769,
    "aesthetic-v2.5": 428_225_600 + 1153,
    "clip": 303_966_208,
    "hpsv2": 632_076_800,
    "imagereward": 446_666_465 - 459_264 - 512 - 927_969 + 769,
    "pickscore": 632_076_800,
    "taste": 14_569,
    "warmth": 0,
}


@pytest.mark.parametrize("name", SIMULATED)
def test_parameters_and_blocks_of_the_true_architecture(name):
    reward = reward_from_config(name, device="meta", dtype=torch.bfloat16)
    assert reward.name == name
    assert not reward.training
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in reward.parameters())
    assert sum(parameter.numel() for parameter in reward.parameters()) == CATALOGUE[name].parameters
    assert CATALOGUE[name].parameters == PARAMETERS.get(name, CATALOGUE[name].parameters)
    kinds = [type(module).__name__ for module in reward.modules()]
    assert sum(kind in reward.checkpointed_block_types for kind in kinds) == BLOCKS.get(name, 0)


@pytest.fixture
def small_configs(tmp_path, monkeypatch):
    small = {"hidden_act": "gelu", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = small | {"image_size": 28, "num_hidden_layers": 3, "patch_size": 7}
    text = small | {"encoder_hidden_size": 32, "is_decoder": True, "num_hidden_layers": 2, "vocab_size": 50}
    for name in ("clip-vit-large-patch14", "hpsv2", "imagereward", "siglip-so400m-patch14-384"):
        projection = {"projection_dim": 16} if "siglip" not in name else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({"vision_config": vision | projection, "text_config": text}))
    monkeypatch.setattr(architectures, "CONFIGS", tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in SIMULATED), ("aesthetic", torch.float32)]
)
def test_forward_and_backward_run_on_fake_tensors(name, dtype, small_configs):
    mode = FakeTensorMode()
    reward = faked(reward_from_config(name, device="meta", dtype=dtype), mode)
    side = 512 if name in BLOCKS else 64
    with mode:
        images = torch.rand(2, 3, side, side, dtype=dtype, requires_grad=True)
        scores = reward(images, ["a cat", "a prompt that no text tower has read"])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert isinstance(scores, FakeTensor)
    assert (scores.shape, scores.dtype, scores.device.type) == ((2,), torch.float32, "cpu")
    assert (gradient.shape, gradient.dtype) == (images.shape, dtype)


def test_checkpointing_runs_on_fake_tensors(small_configs):
    mode = FakeTensorMode()
    reward = faked(reward_from_config("aesthetic", device="meta", dtype=torch.bfloat16), mode)
    checkpointed = checkpoint_blocks(reward, reward.checkpointed_block_types)
    with mode:
        images = torch.rand(1, 3, 224, 224, requires_grad=True)
        torch.autograd.grad(reward(images, ["a"]).sum(), images)
    assert checkpointed.count == checkpointed.blocks == 3


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointing_the_backbone_changes_neither_score_nor_gradient(name, small_configs):
    torch.manual_seed(0)
    reward = reward_from_config(name, dtype=torch.float64)
    images = torch.rand(3, 3, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prompts = ["a", "b", "c"]

    def scored() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.clone().requires_grad_()
        scores = reward(pixels, prompts)
        return scores.detach(), torch.autograd.grad(scores.sum(), pixels)[0]

    kept = scored()
    checkpointed = checkpoint_blocks(reward, reward.checkpointed_block_types)
    again = scored()
    blocks = 5 if name == "imagereward" else 3
    assert (checkpointed.blocks, checkpointed.count) == (blocks, blocks)
    for before, after in zip(kept, again, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert kept[1].abs().max() > 0
    with torch.no_grad():
        reward(images, prompts)
    checkpointed.enabled = False
    scored()
    assert checkpointed.count == blocks


def test_random_weights_are_usable_numbers(small_configs):
    for name in BLOCKS:
        scores = reward_from_config(name)(torch.rand(2, 3, 28, 28), ["a", "b"])
        assert scores.dtype == torch.float32
        assert torch.isfinite(scores).all()


def test_simulated_taste_is_the_shipped_network():
    simulated, loaded = reward_from_config("taste", dtype=torch.bfloat16), load_reward("taste", dtype=torch.bfloat16)
    shapes = [
        {name: (value.shape, value.dtype) for name, value in reward.named_parameters()}
        for reward in (simulated, loaded)
    ]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_simulated_says_what_can(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_not_simulated.py").write_text(
        "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    for name in ("jpeg", "rewards_not_simulated:score"):
        with pytest.raises(UserError, match=rf"{name!r} cannot be simulated: .*\({', '.join(SIMULATED)}\)"):
            reward_from_config(name)
    with pytest.raises(UserError, match="'aestetic' is unknown; did you mean 'aesthetic'"):
        reward_from_config("aestetic")
    assert set(SIMULATED) == set(available_rewards()) - {"jpeg"}


def test_sum_is_simulated_as_its_parts():
    mode = FakeTensorMode()
    reward = faked(reward_from_config("taste * 2 + warmth*-0.5", device="meta", dtype=torch.float32), mode)
    assert sum(parameter.numel() for parameter in reward.parameters()) == 14_569
    with mode:
        images = torch.rand(2, 3, 64, 64, requires_grad=True)
        scores = reward(images, ["a", "b"])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert isinstance(scores, FakeTensor)
    assert (scores.shape, gradient.shape) == ((2,), (2, 3, 64, 64))
    both = reward_from_config("aesthetic*1.0+imagereward*0.5", device="meta", dtype=torch.bfloat16)
    assert both.checkpointed_block_types == {"CLIPEncoderLayer", "BlipEncoderLayer", "BlipTextLayer"}
    with pytest.raises(UserError, match="'jpeg' cannot be simulated"):
        reward_from_config("taste+jpeg")


def test_own_reward_with_a_configuration_is_simulated(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_simulated.py").write_text(
        "import torch\n"
        "from sqdf_fast.rewards import Reward\n"
        "class Linear(Reward):\n"
        "    def __init__(self, layer):\n"
        "        super().__init__()\n"
        "        self.layer = layer\n"
        "    @classmethod\n"
        "    def load(cls, bias, dtype):\n"
        "        reward = cls(torch.nn.Linear(3, 1, dtype=dtype))\n"
        "        torch.nn.init.constant_(reward.layer.weight, 2.0)\n"
        "        torch.nn.init.constant_(reward.layer.bias, bias)\n"
        "        return reward\n"
        "    @classmethod\n"
        "    def from_config(cls, *, device, dtype):\n"
        "        return cls(torch.nn.Linear(3, 1, device=device, dtype=dtype))\n"
        "    def forward(self, images, prompts):\n"
        "        return self.layer(images.mean((2, 3))).squeeze(1)\n"
    )
    loaded = load_reward("rewards_simulated:Linear", bias=0.5)
    assert loaded(torch.ones(1, 3, 2, 2), ["a"]).tolist() == [6.5]
    with pytest.raises(UserError, match="missing a required argument: 'bias'"):
        load_reward("rewards_simulated:Linear")
    simulated = reward_from_config("rewards_simulated:Linear", device="meta", dtype=torch.bfloat16)
    assert (simulated.layer.weight.device.type, simulated.layer.weight.dtype) == ("meta", torch.bfloat16)
