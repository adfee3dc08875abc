from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from support.rewards import assert_gradient_is_of_finite_differences, small_clip
from torch import nn
from transformers import CLIPTextConfig

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.aesthetic import HEAD_FILE, AestheticReward
from sqdf_fast.rewards.head import fold_head
from sqdf_fast.rewards.preprocess import preprocess

WIDTH = 24


class PublishedHead(nn.Module):
    """The layout of the published file: Linear and Dropout layers under the name "layers"."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 20),
            nn.Dropout(0.2),
            nn.Linear(20, 16),
            nn.Dropout(0.2),
            nn.Linear(16, 12),
            nn.Dropout(0.1),
            nn.Linear(12, 8),
            nn.Linear(8, 1),
        )


@pytest.fixture(scope="module")
def clip():
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return small_clip(text, WIDTH)


@pytest.fixture(scope="module")
def clip_folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(1)
    return PublishedHead().eval()


@pytest.fixture(scope="module")
def head_file(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / HEAD_FILE
    torch.save(head.state_dict(), path)
    return path


@torch.no_grad()
def expected_scores(clip, head, images):
    pixels = preprocess(images, 28)
    embeddings = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return head.layers(embeddings / embeddings.norm(dim=1, keepdim=True)).squeeze(1)


def test_score_is_the_head_of_the_normalised_embedding(clip, head, clip_folder, head_file, images):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    found = reward(images, ["a"] * 3)
    torch.testing.assert_close(found, expected_scores(clip, head, images), rtol=1e-5, atol=1e-6)
    assert found.unique().numel() == 3
    features = reward.features(images)
    assert features.shape == (3, WIDTH)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_head_is_folded_exactly(head, clip_folder, head_file, images):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file), dtype=torch.float64)
    assert reward.head.weight.shape == (1, WIDTH)
    embeddings = reward.features(images.double())
    chain = copy.deepcopy(head).double().layers(embeddings).squeeze(1)
    torch.testing.assert_close(reward(images.double(), ["a"] * 3), chain, rtol=1e-13, atol=1e-13)


def test_folding_in_float64_is_closer_than_the_float32_chain(head):
    folded = fold_head(head.state_dict(), "head.pth", AestheticReward.layers, AestheticReward.file)
    exact = copy.deepcopy(head).double().layers
    embeddings = torch.nn.functional.normalize(
        torch.randn(256, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    )
    truth = exact(embeddings)
    once = folded.float()(embeddings.float())
    assert (once - truth).abs().max() <= 1.01 * (head.layers(embeddings.float()) - truth).abs().max()
    torch.testing.assert_close(folded.double()(embeddings), truth, rtol=0, atol=1e-6)


def test_head_of_the_published_widths_folds():
    torch.manual_seed(5)
    widths = (768, 1024, 128, 64, 16, 1)
    chain = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
    tensors = {
        f"layers.{position}.{kind}": getattr(layer, kind)
        for position, layer in zip((0, 2, 4, 6, 7), chain, strict=True)
        for kind in ("weight", "bias")
    }
    detached = {name: value.detach() for name, value in tensors.items()}
    folded = fold_head(detached, "head.pth", AestheticReward.layers, AestheticReward.file)
    embeddings = torch.nn.functional.normalize(torch.randn(8, 768, dtype=torch.float64))
    value = embeddings
    for layer in chain.double():
        value = layer(value)
    torch.testing.assert_close(folded(embeddings), value, rtol=1e-12, atol=1e-13)


def test_only_the_vision_tower_is_kept(clip, clip_folder, head_file, capfd):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    kept = sum(parameter.numel() for parameter in clip.vision_model.parameters())
    kept += clip.visual_projection.weight.numel()
    assert sum(parameter.numel() for parameter in reward.parameters()) == kept + WIDTH + 1
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_folder_with_the_head(head_file, clip_folder, images):
    first = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file.parent))
    second = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    assert torch.equal(first(images, ["a"] * 3), second(images, ["a"] * 3))


def test_safetensors_head_gives_the_same(head, clip_folder, head_file, images, tmp_path):
    path = tmp_path / "head.safetensors"
    save_file(head.state_dict(), path)
    first = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    second = load_reward("aesthetic", clip=str(clip_folder), head=str(path))
    assert torch.equal(first(images, ["a"] * 3), second(images, ["a"] * 3))


def test_head_comes_from_the_hub(monkeypatch, clip_folder, head_file, images):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name: asked.append((repository, name)) or str(head_file),
    )
    reward = load_reward("aesthetic", clip=str(clip_folder))
    assert asked == [("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth")]
    local = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    assert torch.equal(reward(images, ["a"] * 3), local(images, ["a"] * 3))


def test_attention_is_fused(clip_folder, head_file):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    assert reward.vision.config._attn_implementation == "sdpa"


def test_half_precision_network_keeps_a_float32_score(clip_folder, head_file, images):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file), dtype=torch.bfloat16)
    assert reward.vision.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in reward.head.parameters()} == {torch.float32}
    exact = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file))
    found = reward(images.bfloat16(), ["a"] * 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(images, ["a"] * 3), rtol=0, atol=0.05)


def test_gradient_matches_finite_differences(clip_folder, head_file, images):
    reward = load_reward("aesthetic", clip=str(clip_folder), head=str(head_file), dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a")


def test_missing_head_says_how_to_get_it(clip_folder, tmp_path):
    with pytest.raises(
        UserError, match=r"no head at .*gone\.pth.*download sac.*improved-aesthetic-predictor"
    ) as caught:
        load_reward("aesthetic", clip=str(clip_folder), head=str(tmp_path / "gone.pth"))
    assert "\n" not in str(caught.value)


def test_missing_clip_says_how_to_get_it(tmp_path, head_file):
    with pytest.raises(UserError, match=r"no CLIP model at .*hf download openai/clip-vit-large-patch14") as caught:
        load_reward("aesthetic", clip=str(tmp_path / "gone"), head=str(head_file))
    assert "\n" not in str(caught.value)


def test_damaged_clip_weights(clip, head_file, tmp_path):
    clip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no CLIP model at"):
        load_reward("aesthetic", clip=str(tmp_path), head=str(head_file))


def test_clip_without_its_projection(clip, head_file, tmp_path):
    clip.vision_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no weights for visual_projection\.weight \(of 1 missing\)"):
        load_reward("aesthetic", clip=str(tmp_path), head=str(head_file))


def test_head_of_another_width(clip_folder, head, tmp_path):
    tensors = {**head.state_dict(), "layers.0.weight": torch.zeros(20, WIDTH + 1)}
    path = tmp_path / "wide.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=rf"embeddings of {WIDTH} numbers but the head .* reads {WIDTH + 1}"):
        load_reward("aesthetic", clip=str(clip_folder), head=str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.4.bias": None}, "is not the published head"),
        ({"layers.4.bias": torch.zeros(7)}, "is not the published head"),
        ({"layers.6.weight": torch.zeros(8, 13)}, "do not chain"),
        ({"layers.2.weight": torch.zeros(16)}, "is not the published head"),
        ({"layers.7.weight": torch.zeros(2, 8), "layers.7.bias": torch.zeros(2)}, "do not chain"),
    ],
)
def test_head_of_another_architecture(clip_folder, head, tmp_path, change, message):
    tensors = {name: value for name, value in {**head.state_dict(), **change}.items() if value is not None}
    path = tmp_path / "other.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=message):
        load_reward("aesthetic", clip=str(clip_folder), head=str(path))


class Harmful:
    def __reduce__(self):
        return (print, ("code in a weights file ran",))


def test_file_of_something_else(clip_folder, tmp_path):
    path = tmp_path / "head.pth"
    torch.save([1, 2, 3], path)
    with pytest.raises(UserError, match="does not hold named tensors"):
        load_reward("aesthetic", clip=str(clip_folder), head=str(path))


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", pickle.dumps(Harmful(), protocol=2)])
def test_file_that_is_no_weights(clip_folder, tmp_path, content, capsys):
    path = tmp_path / "head.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"head\.pth cannot be read .* download it again"):
        load_reward("aesthetic", clip=str(clip_folder), head=str(path))
    assert "code in a weights file ran" not in capsys.readouterr().out
