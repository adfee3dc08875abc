"""CLIP: its towers, from a shipped configuration and from OpenCLIP's weights, and rewards that are its cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sqdf_fast.rewards.architectures import architecture, empty, filled, load_tokenizer, pretrained
from sqdf_fast.rewards.base import Reward, exact, unit
from sqdf_fast.rewards.preprocess import preprocess
from sqdf_fast.rewards.text_features import ConstantFeatures, PromptFeatures, TextTower, unescaped

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
    from typing_extensions import Self

VIT_L_14 = "openai/clip-vit-large-patch14"
BLOCKS = frozenset({"CLIPEncoderLayer"})


class CosineReward(Reward):
    """r(x, c) = (e / |e|) . (f / |f|), e and f the embeddings of image and prompt.

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        prompts: normalized text features [B, F] of B prompts, float32 or float64; the score is of that dtype.

    Class attributes:
        model: published model, a hub id; config: name of its shipped configuration.
    """

    checkpointed_block_types = BLOCKS
    model: ClassVar[str]
    config: ClassVar[str]

    def __init__(self, vision: CLIPVisionModelWithProjection, prompts: PromptFeatures | ConstantFeatures) -> None:
        super().__init__()
        self.vision, self.prompts = vision, prompts
        self.size: int = vision.config.image_size

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> Self:
        """The image tower with random weights, from the shipped configuration; one vector for every prompt."""
        vision = vision_tower(cls.config, device=device, dtype=dtype)
        return cls(vision, ConstantFeatures(vision.config.projection_dim, exact(dtype)))

    @classmethod
    def towers(
        cls, model: str, tokenizer: str | None, dtype: torch.dtype, clean: Callable[[str], str] = unescaped
    ) -> tuple[CLIPVisionModelWithProjection, PromptFeatures]:
        """The arguments of the constructor, of a model in transformers' format; errors as for :func:`pretrained`."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

        words = load_tokenizer(CLIPTokenizer, tokenizer or model, reward=cls.name, published=cls.model)
        vision = cls.part(CLIPVisionModelWithProjection, model, dtype)

        def text() -> TextTower:
            network = cls.part(CLIPTextModelWithProjection, model, exact(dtype))
            return TextTower(network, words, clean, reward=cls.name, published=cls.model)

        return vision, PromptFeatures(text(), text)

    @classmethod
    def part(cls, kind: Any, model: str, dtype: torch.dtype) -> Any:
        """The part ``kind`` of a model in transformers' format."""
        return pretrained(kind, model, dtype, reward=cls.name, option="model", published=cls.model)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        self.prompts.encode(prompts)

    def drop_text_tower(self) -> None:
        self.prompts.tower = None

    def pixels(self, images: Tensor) -> Tensor:
        """What the image tower sees of images in [0, 1]: [B, 3, size, size], float32 or float64."""
        return preprocess(images, self.size)

    def features(self, images: Tensor) -> Tensor:
        """Normalized image embeddings, [B, F]."""
        pixels = self.pixels(images).to(self.vision.dtype)
        return unit(self.vision(pixel_values=pixels).image_embeds.to(self.prompts.dtype))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.features(images)
        return (features * self.prompts(prompts, features.device)).sum(dim=-1)


def vision_tower(name: str, *, device: torch.device | str, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The image tower of ``configs/<name>.json`` with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**architecture(name, "vision_config"))
    return empty(CLIPVisionModelWithProjection, config, device=device, dtype=dtype)


def open_clip_vision_tower(
    name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> CLIPVisionModelWithProjection:
    """The image tower of ``configs/<name>.json`` with the weights of an OpenCLIP state dict, on the CPU.

    Raises:
        KeyError, RuntimeError: tensors of another architecture.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**architecture(name, "vision_config"))
    return filled(CLIPVisionModelWithProjection, config, _vision_weights(tensors), dtype)


def open_clip_text_tower(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """The text tower; see :func:`open_clip_vision_tower`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**architecture(name, "text_config"))
    return filled(CLIPTextModelWithProjection, config, _text_weights(tensors), dtype)


def _vision_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    embeddings = "vision_model.embeddings"
    yield f"{embeddings}.class_embedding", tensors["visual.class_embedding"]
    yield f"{embeddings}.patch_embedding.weight", tensors["visual.conv1.weight"]
    yield f"{embeddings}.position_embedding.weight", tensors["visual.positional_embedding"]
    yield from _norm(tensors, "visual.ln_pre", "vision_model.pre_layrnorm")
    yield from _blocks(tensors, "visual.transformer.resblocks.", "vision_model.encoder.layers.")
    yield from _norm(tensors, "visual.ln_post", "vision_model.post_layernorm")
    # OpenCLIP multiplies by its projections from the right.
    yield "visual_projection.weight", tensors["visual.proj"].T.contiguous()


def _text_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    embeddings = "text_model.embeddings"
    yield f"{embeddings}.token_embedding.weight", tensors["token_embedding.weight"]
    yield f"{embeddings}.position_embedding.weight", tensors["positional_embedding"]
    yield from _blocks(tensors, "transformer.resblocks.", "text_model.encoder.layers.")
    yield from _norm(tensors, "ln_final", "text_model.final_layer_norm")
    yield "text_projection.weight", tensors["text_projection"].T.contiguous()


def _norm(tensors: Mapping[str, Tensor], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        yield f"{target}.{kind}", tensors[f"{source}.{kind}"]


_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _blocks(tensors: Mapping[str, Tensor], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.startswith(source):
            continue
        index, _, rest = name.removeprefix(source).partition(".")
        block = f"{target}{index}"
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{block}.self_attn.{letter}_proj.{kind}", part
        else:
            layer, _, kind = rest.rpartition(".")
            yield f"{block}.{_LAYERS[layer]}.{kind}", tensor
