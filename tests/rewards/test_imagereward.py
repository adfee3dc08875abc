from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.rewards import assert_gradient_is_of_finite_differences, with_random_weights
from torch import nn
from transformers import BertTokenizer

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import architectures, load_reward, preflight
from sqdf_fast.rewards.imagereward import FILE
from sqdf_fast.rewards.preprocess import preprocess

PROMPTS = ["a cat", "the dog and a fox " * 12, "a [ENC] Fox"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "fox", "and", "##s"]
VISION = {"width": 32, "layers": 2, "heads": 4, "patch": 7, "image": 28, "mlp": 64}
TEXT = {"width": 24, "layers": 2, "heads": 3, "mlp": 48}
# ViT's layer norms add another constant to the variance than BERT's do.
VIT_EPS, BERT_EPS = 1e-6, 1e-12


def attention(query, key, value, heads, mask=None):
    """[B, L, F], heads made and put together again; mask [B, keys] says where nobody looks."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    weights = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None], -torch.inf)
    return (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)


class VitBlock(nn.Module):
    """A block of BLIP's image encoder: its tensors' names, plain attention."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=VIT_EPS) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.heads = heads

    def forward(self, x):
        x = x + self.attn["proj"](attention(*self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1), self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width, layers, heads, patch, image, mlp):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(VitBlock(width, heads, mlp) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=VIT_EPS)

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def dense_and_norm(before, after):
    return nn.ModuleDict({"dense": nn.Linear(before, after), "LayerNorm": nn.LayerNorm(after, eps=BERT_EPS)})


class BertAttention(nn.Module):
    """Queries from the text, keys and values from what it looks at, which is ``width`` wide."""

    def __init__(self, text, width, heads):
        super().__init__()
        self.add_module("self", nn.ModuleDict({"query": nn.Linear(text, text)}))
        inner = self.get_submodule("self")
        inner["key"], inner["value"] = nn.Linear(width, text), nn.Linear(width, text)
        self.output = dense_and_norm(text, text)
        self.heads = heads

    def forward(self, x, seen, mask=None):
        inner = self.get_submodule("self")
        found = attention(inner["query"](x), inner["key"](seen), inner["value"](seen), self.heads, mask)
        return self.output["LayerNorm"](x + self.output["dense"](found))


class BertBlock(nn.Module):
    def __init__(self, width, heads, mlp):
        super().__init__()
        self.attention = BertAttention(width, width, heads)
        self.crossattention = BertAttention(width, VISION["width"], heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp)})
        self.output = dense_and_norm(mlp, width)

    def forward(self, x, mask, seen):
        x = self.crossattention(self.attention(x, x, mask), seen)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class Bert(nn.Module):
    def __init__(self, width, layers, heads, mlp):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(len(WORDS) + 2, width),
                "position_embeddings": nn.Embedding(40, width),
                "LayerNorm": nn.LayerNorm(width, eps=BERT_EPS),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertBlock(width, heads, mlp) for _ in range(layers))})

    def forward(self, numbers, mask, seen):
        parts = self.embeddings
        positions = parts["position_embeddings"](torch.arange(numbers.shape[1]))
        x = parts["LayerNorm"](parts["word_embeddings"](numbers) + positions)
        for block in self.encoder["layer"]:
            x = block(x, mask, seen)
        return x


class PublishedModel(nn.Module):
    """The layout of the published file, small, and its score written down once more."""

    def __init__(self):
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": Vit(**VISION),
                "text_encoder": Bert(**TEXT),
                "vision_proj": nn.Linear(VISION["width"], 8),
                "text_proj": nn.Linear(TEXT["width"], 8),
            }
        )
        widths = [(TEXT["width"], 20), (20, 16), (16, 12), (12, 8), (8, 1)]
        linear = [nn.Linear(*pair) for pair in widths]
        layers = [linear[0], nn.Dropout(), linear[1], nn.Dropout(), linear[2], nn.Dropout(), linear[3], linear[4]]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    @torch.no_grad()
    def score(self, images, prompts):
        numbers, padding = zip(*(self.tokens(prompt) for prompt in prompts), strict=True)
        seen = self.blip["visual_encoder"](preprocess(images, VISION["image"]))
        read = self.blip["text_encoder"](torch.tensor(numbers), torch.tensor(padding), seen)
        return (self.mlp["layers"](read[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072

    @staticmethod
    def tokens(prompt):
        """[CLS], at most 33 words, [SEP], and padding up to 35."""
        known = [*WORDS, "[DEC]", "[ENC]"]
        words = [word if word in known else word.lower() for word in prompt.split()]
        found = [2, *(known.index(word) if word in known else 1 for word in words)][:34]
        found.append(3)
        return found + [0] * (35 - len(found)), [False] * len(found) + [True] * (35 - len(found))


@pytest.fixture(scope="module")
def model():
    return with_random_weights(PublishedModel)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(model.state_dict(), folder / FILE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_architecture(tmp_path, monkeypatch):
    shipped = json.loads((architectures.CONFIGS / "imagereward.json").read_text())
    shipped["vision_config"] |= {
        "hidden_size": VISION["width"],
        "image_size": VISION["image"],
        "intermediate_size": VISION["mlp"],
        "num_attention_heads": VISION["heads"],
        "num_hidden_layers": VISION["layers"],
        "patch_size": VISION["patch"],
    }
    shipped["text_config"] |= {
        "encoder_hidden_size": VISION["width"],
        "hidden_size": TEXT["width"],
        "intermediate_size": TEXT["mlp"],
        "max_position_embeddings": 40,
        "num_attention_heads": TEXT["heads"],
        "num_hidden_layers": TEXT["layers"],
        "vocab_size": len(WORDS) + 2,
    }
    (tmp_path / "imagereward.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(architectures, "CONFIGS", tmp_path)


@pytest.fixture
def load(folder, tokenizer):
    return lambda **options: load_reward(
        "imagereward", **{"weights": str(folder), "tokenizer": str(tokenizer), **options}
    )


def test_score_is_the_published_one(model, load, images):
    reward = load()
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, model.score(images, PROMPTS), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.unique().numel() == 3
    features = reward.features(images)
    assert features.shape == (3, VISION["width"])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_prompt_and_image_count(load, images):
    reward = load()
    assert (reward(images, ["a cat"] * 3) - reward(images, ["a dog"] * 3)).abs().min() > 1e-4
    assert reward(images, ["a cat"] * 3).unique().numel() == 3


def test_score_of_an_image_is_its_own(load, images):
    reward = load()
    together = reward(images, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(reward(images[index : index + 1], [prompt])[0], together[index])


def test_prompts_are_cut_once(load, images, monkeypatch):
    reward = load()
    asked = []
    cut = reward.tokens.tokenizer
    monkeypatch.setattr(reward.tokens, "tokenizer", lambda new, **how: asked.append(new) or cut(new, **how))
    reward.encode_prompts(["a cat", "a cat"])
    reward.drop_text_tower()
    reward(images, ["a cat", "a dog", "a cat"])
    assert asked == [["a cat"], ["a dog"]]


def test_half_precision_network_keeps_a_float32_score(load, images):
    reward = load(dtype=torch.bfloat16)
    assert reward.vision.dtype == reward.text.dtype == torch.bfloat16
    assert reward.head.weight.dtype == torch.float32
    found = reward(images.bfloat16(), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, load()(images, PROMPTS), rtol=0.05, atol=0.5)


def test_gradient_matches_finite_differences(load, images):
    reward = load(dtype=torch.float64)
    assert_gradient_is_of_finite_differences(reward, images, "a fox", atol=1e-8)
    preflight(reward, images.double(), PROMPTS)


def test_safetensors_give_the_same(model, load, images, tmp_path):
    path = tmp_path / "imagereward.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    assert torch.equal(load(weights=str(path))(images, PROMPTS), load()(images, PROMPTS))


def test_weights_come_from_the_hub(monkeypatch, folder, tokenizer):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name: asked.append((repository, name)) or str(folder / FILE),
    )
    load_reward("imagereward", tokenizer=str(tokenizer))
    assert asked == [("THUDM/ImageReward", "ImageReward.pt")]


def test_missing_parts_say_how_to_get_them(load, tmp_path):
    with pytest.raises(UserError, match=r"no weights at .*download ImageReward\.pt from huggingface\.co/THUDM"):
        load(weights=str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match=r"no tokenizer at .*hf download google-bert/bert-base-uncased") as caught:
        load(tokenizer=str(tmp_path / "gone"))
    assert "\n" not in str(caught.value)


def test_another_tokenizer(load, tmp_path):
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS[:-2])}).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has 10 words, the text encoder expects 12; give google-bert/bert-base"):
        load(tokenizer=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.cls_token": None}, "no tensor 'blip.visual_encoder.cls_token'"),
        ({"blip.visual_encoder.blocks.1.norm1.bias": None}, "Missing key.*layers.1.layer_norm1.bias"),
        ({"blip.visual_encoder.blocks.0.ls1.gamma": torch.ones(32)}, "no tensor 'ls1'"),
        ({"blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": None}, "Missing key.*crossattention"),
        ({"blip.text_encoder.pooler.dense.bias": torch.ones(24)}, "Unexpected key.*pooler.dense.bias"),
        ({"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)}, "size mismatch for embeddings"),
    ],
)
def test_weights_of_another_architecture(model, load, tmp_path, change, message):
    state = {name: value for name, value in {**model.state_dict(), **change}.items() if value is not None}
    path = tmp_path / "other.pt"
    torch.save(state, path)
    with pytest.raises(
        UserError, match=rf"is not a published ImageReward model \({message}.*expected BLIP with"
    ) as caught:
        load(weights=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.layers.4.bias": None}, "is not the published head .*mlp.layers.0 to mlp.layers.7"),
        ({"mlp.layers.0.weight": torch.zeros(20, 25)}, "reads 25 numbers but its text encoder gives 24"),
    ],
)
def test_head_of_another_architecture(model, load, tmp_path, change, message):
    state = {name: value for name, value in {**model.state_dict(), **change}.items() if value is not None}
    path = tmp_path / "other.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match=message):
        load(weights=str(path))
