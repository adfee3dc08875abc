from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rewards import assert_gradient_is_of_finite_differences
from transformers import CLIPTokenizer

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import load_reward, preflight
from sqdf_fast.rewards.preprocess import preprocess

PROMPTS = ["a cat", "a very long description of a dog", "salt &amp; pepper"]


@pytest.fixture
def load(clip_and_tokenizer):
    return lambda **options: load_reward("pickscore", **{"model": str(clip_and_tokenizer), **options})


def test_score_is_the_published_one(load, clip_cosines, images):
    reward = load()
    expected = math.exp(3.5) * clip_cosines(preprocess(images, 28), PROMPTS)
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.unique().numel() == 3
    torch.testing.assert_close(reward.features(images).norm(dim=1), torch.ones(3))
    assert reward.vision.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_weights_as_a_pickle_give_the_same(load, clip_and_tokenizer, images, tmp_path):
    shutil.copytree(clip_and_tokenizer, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    assert torch.equal(load(model=str(tmp_path))(images, PROMPTS), load()(images, PROMPTS))


def test_text_tower_can_be_dropped(load, images):
    reward, kept = load(), load()
    reward.encode_prompts(PROMPTS[:2])
    reward.drop_text_tower()
    assert not any("text" in name or "tower" in name for name, _ in reward.named_parameters())
    torch.testing.assert_close(reward(images, PROMPTS), kept(images, PROMPTS), rtol=1e-5, atol=1e-5)
    assert reward.prompts.tower is None


def test_half_precision_network_keeps_a_float32_score(load, images):
    reward, exact = load(dtype=torch.bfloat16), load()
    assert reward.vision.dtype == torch.bfloat16
    assert reward.scale.dtype == reward.prompts.tower.network.dtype == torch.float32
    found = reward(images.bfloat16(), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(images, PROMPTS), rtol=0, atol=1.0)


def test_gradient_matches_finite_differences(load, images):
    reward = load(dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a fox", atol=1e-7)
    preflight(reward, images.double(), PROMPTS)


def test_configuration_of_old_transformers(load, clip_and_tokenizer, images, tmp_path):
    """They say that a prompt ends with token 2 and read the token of the highest number."""
    shutil.copytree(clip_and_tokenizer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(model=str(tmp_path))(images, PROMPTS), load()(images, PROMPTS))


def test_missing_model_says_how_to_get_it(load, clip_and_tokenizer, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"pickscore reward: no tokenizer at .*hf download yuvalkirstain/PickScore_v1"):
        load(model=gone)
    with pytest.raises(UserError, match=r"no CLIP model at .*as the option model, e\.g\. after") as caught:
        load(model=gone, tokenizer=str(clip_and_tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["logit_scale", "visual_projection.weight", "text_projection.weight"])
def test_incomplete_model(load, clip_and_tokenizer, tmp_path, missing):
    shutil.copytree(clip_and_tokenizer, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"holds no weights for {missing} \(of 1 missing\)"):
        load(model=str(tmp_path))


def test_another_tokenizer(load, tmp_path):
    CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ends a prompt with token 1, the text tower expects 513"):
        load(tokenizer=str(tmp_path))
