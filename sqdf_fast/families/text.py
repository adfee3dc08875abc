"""Text encoders as the pipelines of diffusers run them: padded to a fixed length, without an attention mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CLIP_TOKENS = 77
"""Positions of every published CLIP text encoder, for a family built without its tokenizers."""


@contextmanager
def on_device(encoder: Any, device: torch.device) -> Iterator[Any]:
    """``encoder`` on ``device`` inside the block and back afterwards; one that does not fit stays where it is.

    A T5 of 9 GB has no room beside a network on most cards, and is needed once a prompt.
    """
    home = next(encoder.parameters()).device
    try:
        encoder.to(device)
    except torch.OutOfMemoryError:
        encoder.to(home)
    try:
        yield encoder
    finally:
        encoder.to(home)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int, encoder: nn.Module) -> Tensor:
    """Token ids int64 [B, length] on the encoder's device; longer prompts are cut, shorter ones padded."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = tokens.input_ids.to(next(encoder.parameters()).device)
    return ids


def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A CLIP text encoder's last but one layer's states [B, length, width], and its first output.

    The latter is a CLIPTextModelWithProjection's projected pooled embedding [B, projection].
    """
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]
