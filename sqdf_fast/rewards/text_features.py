"""What rewards need of prompts: computed once a prompt, by a text tower that can then be dropped."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError

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
        network: text tower; its dtype is that of the features.
        clean: what is done to a prompt before it is cut into tokens.
        reward, published: reward and hub id of CLIP's tokenizer, for messages.

    Raises:
        UserError: a tokenizer that does not end prompts with the token at which the tower is read.
    """

    def __init__(
        self,
        network: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        clean: Callable[[str], str] = unescaped,
        *,
        reward: str,
        published: str,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.clean = network, tokenizer, clean
        expected = network.config.eos_token_id
        if expected == _LEGACY_END:
            expected = network.config.vocab_size - 1
        if tokenizer.eos_token_id != expected:
            raise UserError(
                f"{reward} reward: the tokenizer ends a prompt with token {tokenizer.eos_token_id}, the text tower "
                f"expects {expected}; give CLIP's, e.g. {published}, as the option tokenizer"
            )

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        cleaned = [self.clean(prompt) for prompt in prompts]
        length = self.network.config.max_position_embeddings
        tokens = self.tokenizer(cleaned, padding=True, truncation=True, max_length=length, return_tensors="pt")
        # No mask is needed: attention is causal, and what is read stands before the padding.
        features = self.network(input_ids=tokens.input_ids.to(self.network.device)).text_embeds
        return features / features.norm(dim=-1, keepdim=True)


class PromptTensors(nn.Module):
    """A tensor for each prompt, computed once and kept on the CPU: subclasses implement ``compute``."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Tensor] = {}

    def compute(self, prompts: Sequence[str]) -> Tensor:
        """Of distinct prompts, [B, ...]."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> None:
        """Compute those that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known.update(zip(new, self.compute(new), strict=True))

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """[B, ...] on ``device``."""
        self.encode(prompts)
        return torch.stack([self._known[prompt] for prompt in prompts]).to(device)


class PromptFeatures(PromptTensors):
    """Text features of prompts.

    Args:
        tower: text tower, used until it is dropped.
        reload: reads the tower again, on the CPU, for a prompt that is new after that.
    """

    def __init__(self, tower: TextTower, reload: Callable[[], TextTower]) -> None:
        super().__init__()
        self.tower: TextTower | None = tower
        self.dtype: torch.dtype = tower.network.dtype
        self._reload = reload

    def compute(self, prompts: Sequence[str]) -> Tensor:
        tower = self.tower or self._reload()
        starts = range(0, len(prompts), _PROMPTS_AT_ONCE)
        return torch.cat([tower(prompts[start : start + _PROMPTS_AT_ONCE]).cpu() for start in starts])


class ConstantFeatures(PromptTensors):
    """One unit vector for every prompt, in place of text features where no weights are loaded."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype, self.tower = width, dtype, None

    def encode(self, prompts: Sequence[str]) -> None:
        """Nothing to compute."""

    def forward(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        return torch.full((len(prompts), self.width), self.width**-0.5, dtype=self.dtype, device=device)
