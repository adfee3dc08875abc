from __future__ import annotations

import pytest
import torch
from support.rewards import CLIP_VOCABULARY, small_clip
from transformers import CLIPTextConfig, CLIPTokenizer


@pytest.fixture(scope="session")
def images():
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def whole_clip():
    """A small CLIP with both towers and a logit scale."""
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=512,
        eos_token_id=513,
    )
    model = small_clip(text)
    model.logit_scale.data.fill_(3.5)
    return model


@pytest.fixture(scope="session")
def clip_and_tokenizer(whole_clip, tmp_path_factory):
    """The folder of it with its tokenizer, as on the hub."""
    folder = tmp_path_factory.mktemp("whole_clip")
    whole_clip.save_pretrained(folder)
    CLIPTokenizer(vocab=CLIP_VOCABULARY, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_cosines(whole_clip, clip_and_tokenizer):
    """The cosines of images that the image tower sees and prompts, as the authors of CLIP rewards compute them."""

    @torch.no_grad()
    def cosines(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokenizer = CLIPTokenizer.from_pretrained(clip_and_tokenizer)
        words = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        seen = whole_clip.visual_projection(whole_clip.vision_model(pixel_values=pixels).pooler_output)
        texts = whole_clip.text_projection(whole_clip.text_model(**words).pooler_output)
        seen, texts = (found / found.norm(dim=-1, keepdim=True) for found in (seen, texts))
        return torch.diagonal(texts @ seen.T)

    return cosines
