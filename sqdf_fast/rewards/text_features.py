"""What a CLIP reward needs of prompts: each encoded once, by a text tower that can then be dropped."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.published import first_line

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

_PROMPTS_AT_ONCE = 32
# Configurations written before transformers 4.31 say this, and the token of the highest number is read instead.
_LEGACY_END = 2


def unescaped(prompt: str) -> str:
    """The prompt as OpenAI's and OpenCLIP's tokenizers clean it, without their repair of broken Unicode."""
    return html.unescape(html.unescape(prompt)).strip()


class TextTower(nn.Module):
    """Prompts to normalized features [B, F].

    Args:
        network: its dtype is that of the features.
        clean: what is done to a prompt before it is cut into tokens.
    """

    def __init__(
        self,
        network: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        clean: Callable[[str], str] = unescaped,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.clean = network, tokenizer, clean

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        cleaned = [self.clean(prompt) for prompt in prompts]
        length = self.network.config.max_position_embeddings
        tokens = self.tokenizer(cleaned, padding=True, truncation=True, max_length=length, return_tensors="pt")
        # No mask is needed: attention is causal, and what is read stands before the padding.
        found = self.network(input_ids=tokens.input_ids.to(self.network.device)).text_embeds
        return found / found.norm(dim=-1, keepdim=True)


class PromptFeatures(nn.Module):
    """Text features of prompts, each encoded once and kept on the CPU.

    Args:
        tower: encodes until it is dropped.
        reload: reads the tower again, on the CPU, for a prompt that is new after that.
    """

    def __init__(self, tower: TextTower, reload: Callable[[], TextTower]) -> None:
        super().__init__()
        self.tower: TextTower | None = tower
        self.dtype: torch.dtype = tower.network.dtype
        self._reload = reload
        self._known: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode those that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if not new:
            return
        tower = self.tower or self._reload()
        for start in range(0, len(new), _PROMPTS_AT_ONCE):
            some = new[start : start + _PROMPTS_AT_ONCE]
            self._known.update(zip(some, tower(some).cpu(), strict=True))

    def drop_tower(self) -> None:
        """Free the text tower."""
        self.tower = None

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        self.encode(prompts)
        return torch.stack([self._known[prompt] for prompt in prompts]).to(device)


class ConstantFeatures(nn.Module):
    """One unit vector for every prompt: what stands in for text features where there are no weights."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype

    def encode(self, prompts: Sequence[str]) -> None:
        """Nothing to do."""

    def drop_tower(self) -> None:
        """Nothing to do."""

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        return torch.full((len(prompts), self.width), self.width**-0.5, dtype=self.dtype, device=device)


def load_clip_tokenizer(place: str, *, reward: str, published: str) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder or the hub.

    Raises:
        UserError: there is none.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{reward} reward: no tokenizer at {place!r} ({first_line(error)}); "
            f"give a folder or hub id as the option tokenizer, e.g. after `hf download {published}`"
        ) from None


def check_tokenizer(
    tokenizer: CLIPTokenizer, network: CLIPTextModelWithProjection, *, reward: str, published: str
) -> None:
    """Raise UserError where ``tokenizer`` does not end prompts with the token at which the tower is read."""
    expected = network.config.eos_token_id
    if expected == _LEGACY_END:
        expected = network.config.vocab_size - 1
    if tokenizer.eos_token_id != expected:
        raise UserError(
            f"{reward} reward: the tokenizer ends a prompt with token {tokenizer.eos_token_id}, the text tower expects "
            f"{expected}; give CLIP's, e.g. {published}, as the option tokenizer"
        )
