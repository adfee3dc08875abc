from __future__ import annotations

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.rewards import CLIP_VOCABULARY, assert_gradient_is_of_finite_differences, with_random_weights
from torch import nn
from transformers import CLIPTokenizer

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import architectures, load_reward, preflight
from sqdf_fast.rewards.hpsv2 import FILES
from sqdf_fast.rewards.preprocess import letterbox

PROMPTS = ["a cat", "a very long dog &amp; a fox", "a cat", ""]
VISION = {"width": 32, "layers": 2, "heads": 4, "patch": 7, "image": 28, "mlp": 128}
TEXT = {"width": 24, "layers": 2, "heads": 3, "length": 16, "mlp": 96}
WIDTH = 20


class Block(nn.Module):
    """A residual attention block of OpenCLIP: its tensors' names, torch's own attention."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, width, layers, heads, mlp):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, layers, heads, patch, image, mlp):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, WIDTH))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, layers, heads, mlp)

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class PublishedModel(nn.Module):
    """The layout of the published file, small, and its score written down once more."""

    def __init__(self):
        super().__init__()
        width, length = TEXT["width"], TEXT["length"]
        self.visual = Visual(**VISION)
        self.transformer = Blocks(width, TEXT["layers"], TEXT["heads"], TEXT["mlp"])
        self.token_embedding = nn.Embedding(len(CLIP_VOCABULARY), width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, prompts):
        """Tokens padded with zeros to the full length, read at the largest token."""
        tokens = torch.zeros(len(prompts), TEXT["length"], dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            words = prompt.replace("&amp;", "&").split()
            letters = [CLIP_VOCABULARY[piece] for word in words for piece in (*word[:-1], f"{word[-1]}</w>")]
            found = [512, *letters[: TEXT["length"] - 2], 513]
            row[: len(found)] = torch.tensor(found)
        mask = torch.full((TEXT["length"],) * 2, -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return F.normalize(x[range(len(tokens)), tokens.argmax(dim=1)] @ self.text_projection, dim=1)

    @torch.no_grad()
    def score(self, images, prompts):
        seen = F.normalize(self.visual(letterbox(images, VISION["image"])), dim=1)
        return torch.diagonal(seen @ self.text(prompts).T)


@pytest.fixture(scope="module")
def model():
    # Published in half precision.
    return with_random_weights(PublishedModel).half().float()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv2")
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / FILES["v2.1"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizer(vocab=CLIP_VOCABULARY, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_architecture(tmp_path, monkeypatch):
    vision = {
        "hidden_act": "gelu",
        "hidden_size": VISION["width"],
        "image_size": VISION["image"],
        "intermediate_size": VISION["mlp"],
        "num_attention_heads": VISION["heads"],
        "num_hidden_layers": VISION["layers"],
        "patch_size": VISION["patch"],
        "projection_dim": WIDTH,
    }
    text = {
        "bos_token_id": 512,
        "eos_token_id": 513,
        "hidden_act": "gelu",
        "hidden_size": TEXT["width"],
        "intermediate_size": TEXT["mlp"],
        "max_position_embeddings": TEXT["length"],
        "num_attention_heads": TEXT["heads"],
        "num_hidden_layers": TEXT["layers"],
        "projection_dim": WIDTH,
        "vocab_size": len(CLIP_VOCABULARY),
    }
    (tmp_path / "hpsv2.json").write_text(json.dumps({"vision_config": vision, "text_config": text}))
    monkeypatch.setattr(architectures, "CONFIGS", tmp_path)


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def load(folder, tokenizer):
    return lambda **options: load_reward("hpsv2", **{"weights": str(folder), "tokenizer": str(tokenizer), **options})


def test_score_is_the_published_cosine(model, load, images):
    reward = load()
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, model.score(images, PROMPTS), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert found.unique().numel() == 4
    features = reward.features(images)
    assert features.shape == (4, WIDTH)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert reward.vision.config._attn_implementation == "sdpa"


def test_prompt_counts(load, images):
    reward = load()
    assert (reward(images, ["a cat"] * 4) - reward(images, ["a dog"] * 4)).abs().min() > 1e-3


def test_prompt_is_cleaned_and_cut_like_the_published_one(model, load):
    reward = load()
    prompts = ["  A   Cat ", "salt &amp;amp; pepper", "an overlong description of something"]
    found = reward.prompts(prompts, torch.device("cpu"))
    expected = model.text(["a cat", "salt & pepper", prompts[2]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_prompts_are_encoded_once(load, images, monkeypatch):
    reward = load()
    asked = []
    tower = reward.prompts.tower
    monkeypatch.setattr(
        tower, "forward", lambda prompts, run=tower.forward: asked.append(list(prompts)) or run(prompts)
    )
    first = reward(images, PROMPTS)
    assert torch.equal(reward(images, PROMPTS), first)
    reward.encode_prompts(["a cat", "a bird", "a bird"])
    assert asked == [["a cat", "a very long dog &amp; a fox", ""], ["a bird"]]


def test_a_batch_of_prompts_has_the_features_of_each_alone(load):
    together, alone = load(), load()
    prompts = [f"{'ab' * (index % 7)} {index}" for index in range(70)]
    together.encode_prompts(prompts)
    for prompt in (prompts[0], prompts[33], prompts[69]):
        torch.testing.assert_close(
            together.prompts([prompt], torch.device("cpu")),
            alone.prompts([prompt], torch.device("cpu")),
            rtol=1e-5,
            atol=1e-6,
        )


def test_dropped_text_tower_is_gone_and_known_prompts_stay(load, images):
    reward, kept = load(), load()
    count = sum(parameter.numel() for parameter in reward.parameters())
    text = sum(parameter.numel() for parameter in reward.prompts.parameters())
    reward.encode_prompts(PROMPTS)
    reward.drop_text_tower()
    assert text > 0
    assert sum(parameter.numel() for parameter in reward.parameters()) == count - text
    assert torch.equal(reward(images, PROMPTS), kept(images, PROMPTS))


def test_new_prompt_after_the_drop_is_encoded_by_a_tower_read_again(load, images):
    reward, kept = load(), load()
    reward.drop_text_tower()
    assert torch.equal(reward(images, PROMPTS), kept(images, PROMPTS))
    assert reward.prompts.tower is None


def test_loading_needs_the_file_no_more(model, folder, tokenizer, images, tmp_path):
    path = tmp_path / "moved.pt"
    path.write_bytes((folder / FILES["v2.1"]).read_bytes())
    reward = load_reward("hpsv2", weights=str(path), tokenizer=str(tokenizer))
    reward.encode_prompts(PROMPTS)
    reward.drop_text_tower()
    path.unlink()
    torch.testing.assert_close(reward(images, PROMPTS), model.score(images, PROMPTS), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"moved\.pt cannot be read"):
        reward(images[:1], ["something new"])


def test_safetensors_give_the_same(model, load, images, tmp_path):
    path = tmp_path / "hps.safetensors"
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)
    assert torch.equal(load(weights=str(path))(images, PROMPTS), load()(images, PROMPTS))


@pytest.mark.parametrize(("version", "name"), [("v2.1", "HPS_v2.1_compressed.pt"), ("v2.0", "HPS_v2_compressed.pt")])
def test_weights_come_from_the_hub(monkeypatch, folder, tokenizer, version, name):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name: asked.append((repository, name)) or str(folder / FILES["v2.1"]),
    )
    load_reward("hpsv2", version=version, tokenizer=str(tokenizer))
    assert asked == [("xswu/HPSv2", name)]


def test_half_precision_network_keeps_a_float32_score(load, images):
    reward, exact = load(dtype=torch.bfloat16), load()
    assert reward.vision.dtype == torch.bfloat16
    assert reward.prompts.tower.network.dtype == torch.float32
    found = reward(images.bfloat16(), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(images, PROMPTS), rtol=0, atol=0.03)


def test_gradient_matches_finite_differences(load, images):
    reward = load(dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a fox")
    preflight(reward, images.double(), PROMPTS)


def test_unknown_version(load):
    with pytest.raises(UserError, match=r"version 'v3' is unknown; allowed: v2\.1, v2\.0"):
        load(version="v3")


def test_missing_weights_say_how_to_get_them(load, tmp_path):
    with pytest.raises(
        UserError, match=r"no weights at .*download HPS_v2\.1_compressed\.pt from huggingface\.co"
    ) as caught:
        load(weights=str(tmp_path / "gone.pt"))
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_says_how_to_get_it(load, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*hf download openai/clip-vit-large-patch14") as caught:
        load(tokenizer=str(tmp_path / "gone"))
    assert "\n" not in str(caught.value)


def test_another_tokenizer(load, tmp_path):
    CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ends a prompt with token 1, the text tower expects 513"):
        load(tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "no tensor 'visual.proj'"),
        ({"visual.transformer.resblocks.1.ln_1.bias": None}, "Missing key.*layers.1.layer_norm1.bias"),
        ({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)}, "no tensor 'ls_1'"),
        ({"visual.transformer.resblocks.2.ln_1.bias": torch.ones(32)}, "Unexpected key.*layers.2.layer_norm1.bias"),
        ({"visual.conv1.weight": torch.zeros(32, 3, 14, 14)}, "size mismatch for .*patch_embedding.weight"),
        ({"token_embedding.weight": torch.zeros(9, 24)}, "size mismatch for .*token_embedding.weight"),
    ],
)
def test_weights_of_another_architecture(model, load, tmp_path, change, message):
    state = {name: value for name, value in {**model.state_dict(), **change}.items() if value is not None}
    path = tmp_path / "other.pt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=rf"is not a published HPSv2 model \({message}.*expected OpenCLIP's") as caught:
        load(weights=str(path))
    assert "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self):
        return (print, ("code in a weights file ran",))


@pytest.mark.parametrize("content", [b"<html>not found</html>", pickle.dumps(Harmful(), protocol=2)])
def test_file_that_is_no_weights(load, tmp_path, content, capsys):
    path = tmp_path / "hps.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"hps\.pt cannot be read .* download it again"):
        load(weights=str(path))
    assert "code in a weights file ran" not in capsys.readouterr().out
