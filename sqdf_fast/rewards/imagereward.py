"""ImageReward: BLIP reads prompt and image together, and a linear head scores what it understood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.architectures import (
    architecture,
    empty,
    filled,
    load_tokenizer,
    refuse_other_architectures,
)
from sqdf_fast.rewards.base import Reward, exact, unit
from sqdf_fast.rewards.head import fold_head
from sqdf_fast.rewards.preprocess import preprocess
from sqdf_fast.rewards.published import PublishedFile
from sqdf_fast.rewards.text_features import PromptTensors

if TYPE_CHECKING:
    from transformers import BertTokenizer
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

WEIGHTS = "THUDM/ImageReward"
FILE = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
# The authors' normalization of the raw score.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
_CONFIG = "imagereward"
_LINEAR = tuple(f"mlp.layers.{position}" for position in (0, 2, 4, 6, 7))


class ImageReward(Reward):
    """ImageReward v1.0, typically -2 to 2.

    r(x, c) = (w . h + b - mean) / std, h = the first token of BLIP's text encoder, which reads the prompt and attends
    to the image's ViT-L/16 tokens in every layer; w and b are the published head, five Linear layers without
    activation, multiplied out; mean and std are the authors'. Source: github.com/THUDM/ImageReward (arXiv 2304.05977).
    Prompts are cut after 35 tokens. The text encoder reads the images too and stays.

    Args:
        vision, text: of one dtype, that of the network's arithmetic.
        head: from the text encoder's width to the raw score, float32 or float64; the score is of that dtype.
        tokens: token numbers and mask of prompts, int64 [B, 2, 35].
    """

    name = "imagereward"
    checkpointed_block_types = frozenset({"BlipEncoderLayer", "BlipTextLayer"})

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Linear, tokens: Tokens | ConstantTokens
    ) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokens = vision, text, head, tokens
        self.size: int = vision.config.image_size

    @classmethod
    def load(
        cls, weights: str = WEIGHTS, tokenizer: str = TOKENIZER, dtype: torch.dtype = torch.float32
    ) -> ImageReward:
        """The published weights.

        Args:
            weights: the published ``.pt``, its tensors as ``.safetensors``, a folder with it, or a hub id.
            tokenizer: folder or hub id of bert-base-uncased's tokenizer.
            dtype: of BLIP; head and score are float32 (float64 with float64).

        Raises:
            UserError: weights or a tokenizer that cannot be found or are of another architecture.
        """
        published = PublishedFile(cls.name, "weights", FILE, f"huggingface.co/{WEIGHTS}")
        path = published.find(weights)
        tensors = published.read(path)
        expected = f"BLIP with ViT-L/16 as in {FILE} from huggingface.co/{WEIGHTS}"
        with refuse_other_architectures(path, reward=cls.name, what="ImageReward model", expected=expected):
            vision, text = (
                filled(model, config, renamed(tensors), dtype, **options)
                for renamed, (model, config, options) in zip(
                    (_vision_weights, _text_weights), _architecture(), strict=True
                )
            )
        head = fold_head(tensors, path, _LINEAR, published)
        width = text.config.hidden_size
        if head.in_features != width:
            raise UserError(
                f"{cls.name} reward: the head of {path} reads {head.in_features} numbers but its text encoder gives "
                f"{width}; expected {expected}"
            )
        return cls(vision, text, head.to(exact(dtype)), Tokens(_tokenizer(tokenizer, text.config.vocab_size)))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> ImageReward:
        """The same modules with random weights, from the shipped configuration; the same tokens for every prompt."""
        vision, text = (
            empty(model, config, device=device, dtype=dtype, **options) for model, config, options in _architecture()
        )
        head = nn.Linear(text.config.hidden_size, 1, device=device, dtype=exact(dtype))
        return cls(vision, text, head, ConstantTokens())

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        self.tokens.encode(prompts)

    def features(self, images: Tensor) -> Tensor:
        """Normalized first token of the image encoder, [B, 1024]."""
        return unit(self._seen(images)[:, 0].to(self.head.weight.dtype))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self._seen(images)
        numbers, mask = self.tokens(prompts, seen.device).unbind(1)
        # 0 where a token may be looked at, almost minus infinity at padding: [B, 1, 1, 35], for all heads and queries.
        additive = (1 - mask)[:, None, None].to(seen.dtype) * torch.finfo(seen.dtype).min
        read = self.text(input_ids=numbers, attention_mask=additive, encoder_hidden_states=seen, is_decoder=False)
        raw = self.head(read.last_hidden_state[:, 0].to(self.head.weight.dtype)).squeeze(-1)
        return (raw - MEAN) / STD

    def _seen(self, images: Tensor) -> Tensor:
        pixels = preprocess(images, self.size).to(self.vision.dtype)
        return self.vision(pixel_values=pixels).last_hidden_state


class Tokens(PromptTensors):
    """Token numbers and mask of prompts, int64 [B, 2, 35]."""

    def __init__(self, tokenizer: BertTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def compute(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return torch.stack([tokens.input_ids, tokens.attention_mask], dim=1)


class ConstantTokens(PromptTensors):
    """As many tokens for every prompt, all the same, where no tokenizer is loaded."""

    def encode(self, prompts: Sequence[str]) -> None:
        """Nothing to compute."""

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        return torch.ones(len(prompts), 2, LENGTH, dtype=torch.int64, device=device)


def _architecture() -> list[tuple[Any, Any, dict[str, Any]]]:
    """Model, configuration and keywords of image encoder and text encoder."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    return [
        (BlipVisionModel, BlipVisionConfig(**architecture(_CONFIG, "vision_config")), {}),
        (BlipTextModel, BlipTextConfig(**architecture(_CONFIG, "text_config")), {"add_pooling_layer": False}),
    ]


# BLIP's names of a ViT block's layers, and transformers'.
_LAYERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


def _vision_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    source = "blip.visual_encoder."
    for name, target in _OUTSIDE.items():
        yield target, tensors[source + name]
    for name, tensor in tensors.items():
        if name.startswith(f"{source}blocks."):
            index, _, rest = name.removeprefix(f"{source}blocks.").partition(".")
            layer, _, kind = rest.rpartition(".")
            yield f"encoder.layers.{index}.{_LAYERS[layer]}.{kind}", tensor


def _text_weights(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # transformers kept BLIP's names; the positions are counted again.
    source = "blip.text_encoder."
    for name, tensor in tensors.items():
        if name.startswith(source) and not name.endswith(".position_ids"):
            yield name.removeprefix(source), tensor


def _tokenizer(place: str, vocabulary: int) -> BertTokenizer:
    from transformers import BertTokenizer

    tokenizer = load_tokenizer(BertTokenizer, place, reward=ImageReward.name, published=TOKENIZER)
    # BLIP's own two tokens; its text encoder has an embedding for each.
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise UserError(
            f"imagereward reward: the tokenizer {place} has {len(tokenizer) - 2} words, the text encoder expects "
            f"{vocabulary - 2}; give {TOKENIZER} as the option tokenizer"
        )
    return tokenizer
