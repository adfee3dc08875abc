from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.rewards import assert_gradient_is_of_finite_differences, with_random_weights
from torch import nn
from transformers import SiglipConfig, SiglipModel

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.aesthetic_v2_5 import HEAD, HEAD_FILE
from sqdf_fast.rewards.preprocess import stretch

WIDTH = 24


class PublishedHead(nn.Module):
    """The layout of the published file: Linear and Dropout layers under the name "scoring_head"."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(WIDTH, 20), (20, 16), (16, 12), (12, 8), (8, 1)]
        layers = [part for pair in widths for part in (nn.Linear(*pair), nn.Dropout(0.5))][:-1]
        self.scoring_head = nn.Sequential(*layers)


@pytest.fixture(scope="module")
def siglip():
    vision = {
        "hidden_size": WIDTH,
        "image_size": 30,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 7,
    }
    text = {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 50}
    text |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    return with_random_weights(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))


@pytest.fixture(scope="module")
def folder(siglip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    siglip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(1)
    # Published in half precision.
    return PublishedHead().eval().bfloat16().float()


@pytest.fixture(scope="module")
def head_file(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / HEAD_FILE
    torch.save({name: value.bfloat16() for name, value in head.state_dict().items()}, path)
    return path


@pytest.fixture
def load(folder, head_file):
    return lambda **options: load_reward("aesthetic-v2.5", **{"siglip": str(folder), "head": str(head_file), **options})


@torch.no_grad()
def expected_scores(siglip, head, images):
    embeddings = siglip.vision_model(pixel_values=stretch(images, 30)).pooler_output
    return head.scoring_head(embeddings / embeddings.norm(dim=-1, keepdim=True)).squeeze(1)


def test_score_is_the_head_of_the_normalised_embedding(siglip, head, load, images):
    reward = load()
    found = reward(images, ["a"] * 3)
    torch.testing.assert_close(found, expected_scores(siglip, head, images), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert found.unique().numel() == 3
    features = reward.features(images)
    assert features.shape == (3, WIDTH)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert reward.vision.config._attn_implementation == "sdpa"


def test_only_the_vision_tower_is_kept(siglip, load, capfd):
    reward = load()
    kept = sum(parameter.numel() for parameter in siglip.vision_model.parameters())
    assert sum(parameter.numel() for parameter in reward.parameters()) == kept + WIDTH + 1
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_half_precision_network_keeps_a_float32_score(load, images):
    reward = load(dtype=torch.bfloat16)
    assert reward.vision.dtype == torch.bfloat16
    assert reward.head.weight.dtype == torch.float32
    found = reward(images.bfloat16(), ["a"] * 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, load()(images, ["a"] * 3), rtol=0, atol=0.05)


def test_gradient_matches_finite_differences(load, images):
    reward = load(dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a")


def test_head_is_downloaded_once_from_its_repository(load, head_file, images, tmp_path, monkeypatch):
    asked = []

    def download(address, path, progress):
        asked.append(address)
        with open(path, "wb") as file:
            file.write(head_file.read_bytes())

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    first, second = load(head=HEAD), load(head=HEAD)
    assert asked == [
        "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
    ]
    assert torch.equal(first(images, ["a"] * 3), load()(images, ["a"] * 3))
    assert torch.equal(second(images, ["a"] * 3), first(images, ["a"] * 3))


def test_download_that_fails_says_what_to_do(load, tmp_path, monkeypatch):
    def download(address, path, progress):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(UserError, match=r"no route to host\); download aesthetic_predictor_v2_5\.pth .*option head"):
        load(head=HEAD)


def test_missing_parts_say_how_to_get_them(load, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no SigLIP model at .*option siglip.*hf download google/siglip-so400m"):
        load(siglip=gone)
    with pytest.raises(UserError, match=r"aesthetic-v2\.5 reward: no head at .*github\.com/discus0434") as caught:
        load(head=gone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_head.4.bias": None}, "is not the published head .*scoring_head.0 to scoring_head.8"),
        ({"scoring_head.6.weight": torch.zeros(8, 13)}, "do not chain"),
        ({"scoring_head.0.weight": torch.zeros(20, WIDTH + 1)}, f"embeddings of {WIDTH} numbers but the head"),
    ],
)
def test_head_of_another_architecture(load, head, tmp_path, change, message):
    tensors = {name: value for name, value in {**head.state_dict(), **change}.items() if value is not None}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"aesthetic-v2\.5 reward: .*{message}"):
        load(head=str(path))


def test_siglip_without_its_pooling_head(load, siglip, folder, tmp_path):
    weights = {
        name: value.clone()
        for name, value in siglip.state_dict().items()
        if "vision_model.head.probe" not in name and name.startswith("vision_model")
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    with pytest.raises(UserError, match=r"holds no weights for .*head\.probe \(of 1 missing\)"):
        load(siglip=str(tmp_path))
