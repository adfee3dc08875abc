"""CLIP towers: from a shipped configuration, from transformers' format and from OpenCLIP's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sqdf_fast.rewards.architectures import architecture, empty, filled, pretrained

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

BLOCKS = frozenset({"CLIPEncoderLayer"})


def vision_tower(name: str, *, device: torch.device | str, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The image tower of ``configs/<name>.json`` with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**architecture(name, "vision_config"))
    return empty(CLIPVisionModelWithProjection, config, device=device, dtype=dtype)


def load_vision_tower(
    clip: str, dtype: torch.dtype, *, reward: str, published: str, option: str = "clip"
) -> CLIPVisionModelWithProjection:
    """The image tower of a CLIP model in transformers' format.

    Args:
        clip: folder or hub id; reward: which reward asks; published: the hub id that a user should get; option: the
            reward's option that gave ``clip``.

    Raises:
        UserError: there is no such model, or it holds no image tower.
    """
    from transformers import CLIPVisionModelWithProjection

    return pretrained(
        CLIPVisionModelWithProjection, clip, dtype, reward=reward, option=option, kind="CLIP", published=published
    )


def load_text_tower(
    clip: str, dtype: torch.dtype, *, reward: str, published: str, option: str = "clip"
) -> CLIPTextModelWithProjection:
    """The text tower; see :func:`load_vision_tower`."""
    from transformers import CLIPTextModelWithProjection

    return pretrained(
        CLIPTextModelWithProjection, clip, dtype, reward=reward, option=option, kind="CLIP", published=published
    )


def load_logit_scale(clip: str, dtype: torch.dtype, *, reward: str, published: str, option: str = "clip") -> Tensor:
    """What CLIP multiplies its cosines by, exp of the learned logarithm: a number on the CPU."""
    from transformers import CLIPConfig, CLIPPreTrainedModel

    class LogitScale(CLIPPreTrainedModel):
        """The one tensor of a CLIP model that belongs to neither tower."""

        config_class = CLIPConfig

        def __init__(self, config: CLIPConfig) -> None:
            super().__init__(config)
            self.logit_scale = torch.nn.Parameter(torch.zeros(()))
            self.post_init()

    found = pretrained(LogitScale, clip, dtype, reward=reward, option=option, kind="CLIP", published=published)
    return found.logit_scale.detach().exp()


def open_clip_vision_tower(
    name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> CLIPVisionModelWithProjection:
    """The image tower of ``configs/<name>.json`` with the weights of an OpenCLIP state dict, on the CPU.

    Raises:
        KeyError, RuntimeError: the tensors are of another architecture.
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
