"""Small networks in the layouts of the published rewards, and what every reward has to hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from sqdf_fast.rewards import preflight
from sqdf_fast.rewards.base import Reward

Network = TypeVar("Network", bound=nn.Module)

_ALPHABET = sorted(ByteLevel.alphabet())
CLIP_VOCABULARY = {word: index for index, word in enumerate([*_ALPHABET, *(f"{letter}</w>" for letter in _ALPHABET)])}
"""A token a letter, by CLIP's two spellings."""
CLIP_VOCABULARY["<|startoftext|>"], CLIP_VOCABULARY["<|endoftext|>"] = 512, 513


def with_random_weights(make: Callable[[], Network]) -> Network:
    """The network in evaluation mode, its weights large enough that scores of different images differ."""
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def small_clip(text: CLIPTextConfig, projection: int = 24) -> CLIPModel:
    """Both towers; images of 28x28."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=projection,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection)
    return with_random_weights(lambda: CLIPModel(config))


def assert_gradient_is_of_finite_differences(reward: Reward, images: Tensor, prompt: str, atol: float = 1e-9) -> None:
    """Along one direction, in float64."""
    pixels = (0.1 + 0.8 * images[:1].double()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, [prompt]).sum(), pixels)
    direction = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ahead, behind = (reward(pixels + h * direction, [prompt]) for h in (1e-6, -1e-6))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind).squeeze() / 2e-6, rtol=1e-6, atol=atol)
    preflight(reward, images.double(), [prompt] * len(images))
