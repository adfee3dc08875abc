"""Human Preference Score v2: the cosine of an image and its prompt in a CLIP that was fine-tuned on human choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.architectures import of_published
from sqdf_fast.rewards.clip import open_clip_text_tower, open_clip_vision_tower, vision_tower
from sqdf_fast.rewards.cosine import CosineReward
from sqdf_fast.rewards.preprocess import letterbox
from sqdf_fast.rewards.published import PublishedFile
from sqdf_fast.rewards.text_features import (
    ConstantFeatures,
    PromptFeatures,
    TextTower,
    check_tokenizer,
    load_clip_tokenizer,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WEIGHTS = "xswu/HPSv2"
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
# The vocabulary of every CLIP with OpenAI's tokenizer, OpenCLIP's ViT-H/14 among them.
TOKENIZER = "openai/clip-vit-large-patch14"
_CONFIG = "hpsv2"


class HPSv2Reward(CosineReward):
    """Human Preference Score v2.1 (or v2.0), about 0.1 to 0.4; it compares images of one prompt.

    r(x, c) = (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in OpenCLIP's ViT-H/14, without the
    learned logit scale, as ``hpsv2.score`` computes it. Source: github.com/tgxs002/HPSv2 (arXiv 2306.09341).

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        prompts: normalized text features [B, F] of B prompts, float32 or float64; the score is of that dtype.
    """

    name = "hpsv2"

    @classmethod
    def load(
        cls,
        weights: str = WEIGHTS,
        version: str = "v2.1",
        tokenizer: str = TOKENIZER,
        dtype: torch.dtype = torch.float32,
    ) -> HPSv2Reward:
        """The published weights.

        Args:
            weights: the published ``.pt``, the same tensors as ``.safetensors``, a folder that holds the published
                file, or the id of a hub repository.
            version: "v2.1" or "v2.0"; names the file in a folder or repository.
            tokenizer: folder or hub id of CLIP's tokenizer.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: an unknown version; weights or a tokenizer that cannot be found or are of another architecture.
        """
        if version not in FILES:
            raise UserError(f"hpsv2 reward: version {version!r} is unknown; allowed: {', '.join(FILES)}")
        published = PublishedFile(cls.name, "weights", "weights", FILES[version], f"huggingface.co/{WEIGHTS}")
        path = published.find(weights)
        tensors = published.read(path)
        exact = torch.promote_types(dtype, torch.float32)
        words = load_clip_tokenizer(tokenizer, reward=cls.name, published=TOKENIZER)
        vision = _published(path, partial(open_clip_vision_tower, _CONFIG, tensors, dtype))
        text = _text_tower(path, tensors, words, exact)
        # Called later, if at all: it must not keep the tensors alive.
        reload = partial(_read_text_tower, published, path, words, exact)
        return cls(vision, PromptFeatures(text, reload))

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> HPSv2Reward:
        """The image tower with random weights, from the shipped configuration; one vector for every prompt."""
        vision = vision_tower(_CONFIG, device=device, dtype=dtype)
        return cls(vision, ConstantFeatures(vision.config.projection_dim, torch.promote_types(dtype, torch.float32)))

    def pixels(self, images: Tensor) -> Tensor:
        return letterbox(images, self.size)


def _read_text_tower(published: PublishedFile, path: Path, tokenizer: CLIPTokenizer, dtype: torch.dtype) -> TextTower:
    return _text_tower(path, published.read(path), tokenizer, dtype)


def _text_tower(path: Path, tensors: Mapping[str, Tensor], tokenizer: CLIPTokenizer, dtype: torch.dtype) -> TextTower:
    network = _published(path, partial(open_clip_text_tower, _CONFIG, tensors, dtype))
    check_tokenizer(tokenizer, network, reward=HPSv2Reward.name, published=TOKENIZER)
    return TextTower(network, tokenizer)


def _published(path: Path, make: Callable[[], Any]) -> Any:
    expected = f"OpenCLIP's ViT-H/14 as in {FILES['v2.1']} from huggingface.co/{WEIGHTS}"
    return of_published(make, path, reward=HPSv2Reward.name, what="HPSv2 model", expected=expected)
