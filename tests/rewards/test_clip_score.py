from __future__ import annotations

import pytest
import torch
from support.rewards import assert_gradient_is_of_finite_differences

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import load_reward, preflight
from sqdf_fast.rewards.preprocess import preprocess

PROMPTS = ["a cat", "a very long description of a dog", "a fox"]


@pytest.fixture
def load(clip_and_tokenizer):
    return lambda **options: load_reward("clip", **{"model": str(clip_and_tokenizer), **options})


def test_score_is_the_weighted_cosine(load, clip_cosines, images):
    reward = load()
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, 2.5 * clip_cosines(preprocess(images, 28), PROMPTS), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert found.unique().numel() == 3


def test_prefix_and_markup(load, clip_cosines, images):
    found = load(prefix="seen:")(images, [" a &amp;amp; b", "cat", "dog"])
    expected = clip_cosines(preprocess(images, 28), ["seen:  a & b", "seen: cat", "seen: dog"])
    torch.testing.assert_close(found, 2.5 * expected, rtol=1e-5, atol=1e-6)


def test_clamped_as_published_and_with_a_gradient_otherwise(load, images):
    reward, clamped = load(), load(clamp=True)
    scores = reward(images, PROMPTS)
    worst = int(scores.argmin())
    if scores[worst] >= 0:
        # Cosines with the opposite of a prompt's features: the small random CLIP agrees with every image.
        for found in (reward, clamped):
            found.encode_prompts(PROMPTS)
            found.prompts._known = {prompt: -value for prompt, value in found.prompts._known.items()}
        scores = reward(images, PROMPTS)
    assert scores.min() < 0
    torch.testing.assert_close(clamped(images, PROMPTS), scores.clamp(min=0))
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS).sum(), pixels)
    assert gradient.flatten(1).any(dim=1).all()


def test_gradient_matches_finite_differences(load, images):
    reward = load(dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a fox")
    preflight(reward, images.double(), PROMPTS)


def test_half_precision_network_keeps_a_float32_score(load, images):
    reward = load(dtype=torch.bfloat16)
    assert reward.vision.dtype == torch.bfloat16
    found = reward(images.bfloat16(), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, load()(images, PROMPTS), rtol=0, atol=0.08)


def test_text_tower_can_be_dropped(load, images):
    reward, kept = load(prefix="seen:"), load(prefix="seen:")
    reward.encode_prompts(PROMPTS[:1])
    reward.drop_text_tower()
    torch.testing.assert_close(reward(images, PROMPTS), kept(images, PROMPTS), rtol=1e-5, atol=1e-5)
    assert reward.prompts.tower is None


def test_missing_model_says_how_to_get_it(load, clip_and_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"clip reward: no CLIP model at .*hf download openai/clip-vit-large-patch14"):
        load(model=str(tmp_path / "gone"), tokenizer=str(clip_and_tokenizer))
