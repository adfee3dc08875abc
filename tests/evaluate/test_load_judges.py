"""Which judges a model gets, held-out rewards and judges by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import ImageJudge, Judges, available_judges, evaluate_images, load_judges
from sqdf_fast.evaluate.embedding import RewardFeatures, Thumbnails
from sqdf_fast.evaluate.reward_judges import ClipAlignment, RewardJudge
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.base import FunctionReward, Reward
from sqdf_fast.rewards.clip_score import CLIPScoreReward
from sqdf_fast.rewards.text_features import ConstantFeatures

OWN = ["diversity", "vendi", "vendi_all", "distance_to_base"]


class TwoTowers(Reward):
    """Reads prompts and remembers what it was told of them."""

    name = "two towers"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.known, self.dropped = scale, [], False

    def encode_prompts(self, prompts):
        assert not self.dropped
        self.known += prompts

    def drop_text_tower(self):
        self.dropped = True

    def forward(self, images, prompts):
        assert set(prompts) <= set(self.known)
        return self.scale * images.mean(dim=(1, 2, 3))

    def features(self, images):
        return images.mean(dim=(2, 3))


def darkness(images, prompts, offset=0.0):
    return offset - images.mean(dim=(1, 2, 3))


class Redness(ImageJudge):
    name = "redness"

    def score(self, images, prompts):
        return images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def module(monkeypatch):
    """This file under a name that a user would give."""
    mine = ModuleType("mine")
    mine.darkness, mine.TwoTowers, mine.Redness, mine.constant = darkness, TwoTowers, Redness, 3
    monkeypatch.setitem(sys.modules, "mine", mine)


@pytest.fixture
def images():
    return torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 8, 8)


def test_judges_by_model():
    warmth = load_reward("warmth")
    shapes = load_judges("shapes", warmth)
    assert list(shapes.by_name) == ["true_reward", "alignment", "attribute_accuracy", *OWN]
    assert shapes.diversity_measure == "attributes that the prompt leaves free"
    other = load_judges("runwayml/some-model", warmth)
    assert list(other.by_name) == OWN
    assert isinstance(other.embedding, Thumbnails)
    assert other.diversity_measure == Thumbnails.description
    assert isinstance(load_judges("runwayml/some-model", TwoTowers()).embedding, RewardFeatures)


def test_held_out_rewards(module, images):
    specs = ("mine:darkness", "mine:TwoTowers")
    judges = load_judges("model", load_reward("warmth"), held_out=specs, options={"mine:darkness": {"offset": 2.0}})
    judges.encode_prompts(["a", "b"])
    towers = judges.by_name["held_out_mine_TwoTowers"]
    assert (towers.reward.known, towers.reward.dropped) == (["a", "b"], True)
    found = evaluate_images(images, ["a", "a", "b", "b"], load_reward("warmth"), judges)
    assert found["eval_held_out_mine_TwoTowers"] == pytest.approx(0.5)
    assert found["eval_held_out_mine_darkness"] == pytest.approx(1.5)
    # The prompts' means are 1/6 and 5/6.
    assert found["eval_held_out_mine_darkness_low"] == pytest.approx(2 - 5 / 6)
    assert found["eval_held_out_mine_darkness_high"] == pytest.approx(2 - 1 / 6)


def test_a_held_out_reward_that_fails_is_refused(module, images):
    judges = Judges(
        [RewardJudge("held_out_wrong", FunctionReward(lambda x, p: x, "wrong", {}), owns_reward=True)], None
    )
    with pytest.raises(UserError, match="reward 'wrong' returned shape"):
        evaluate_images(images, ["a"] * 4, load_reward("warmth"), judges)


def test_clip_is_the_alignment_of_other_models(monkeypatch, images):
    asked = {}

    def load(spec, **options):
        asked.update(options, spec=spec)
        return TwoTowers()

    monkeypatch.setattr("sqdf_fast.evaluate.reward_judges.load_reward", load)
    options = {"clip": {"model": "folder"}}
    judges = load_judges("model", load_reward("warmth"), names=["clip"], options=options, dtype=torch.bfloat16)
    assert asked == {"spec": "clip", "dtype": torch.bfloat16, "model": "folder"}
    judges.encode_prompts(["a", "b"])
    assert judges.alignment(images, ["a"] * 4).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    found = evaluate_images(images, ["a", "a", "b", "b"], load_reward("warmth"), judges)
    assert found["eval_alignment"] == pytest.approx(0.5)
    assert found["eval_alignment_shuffled"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="two judges are called 'alignment'"):
        load_judges("shapes", load_reward("warmth"), names=["clip"])


def test_clip_alignment_is_the_mean_clip_score(images):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    reward = CLIPScoreReward(CLIPVisionModelWithProjection(config).eval(), ConstantFeatures(4, torch.float32))
    judges = Judges([ClipAlignment("alignment", reward, owns_reward=True)], Thumbnails())
    found = evaluate_images(images, ["a", "a", "b", "b"], load_reward("warmth"), judges)
    assert found["eval_alignment"] == pytest.approx(reward(images, ["a"] * 4).mean().item(), abs=1e-6)
    # One vector stands for every prompt: exchanging them changes nothing.
    assert found["eval_alignment_shuffled"] == pytest.approx(found["eval_alignment"], abs=1e-6)


def test_shuffling_costs_an_expensive_judge_one_pass(images):
    calls = []

    class Counting(TwoTowers):
        def forward(self, images, prompts):
            calls.append(len(images))
            return images.mean(dim=(1, 2, 3))

    judges = Judges([ClipAlignment("alignment", Counting(), owns_reward=True)], Thumbnails())
    evaluate_images(images, ["a", "b", "c", "d"], load_reward("warmth"), judges)
    assert calls == [4, 4]


def test_without_a_judge_there_is_no_alignment(images):
    assert load_judges("model", load_reward("warmth")).alignment(images, ["a"] * 4) is None


def test_a_judge_of_ones_own(module, images):
    judges = load_judges("model", load_reward("warmth"), names=["mine:Redness", "frechet"])
    assert list(judges.by_name) == [*OWN, "redness", "frechet_to_base"]
    assert judges.better["redness"] == "higher"
    assert judges.better["distance_to_base"] == "lower"
    found = evaluate_images(images, ["a", "a", "b", "b"], load_reward("warmth"), judges, base=judges.embed(images))
    assert found["eval_redness"] == pytest.approx(0.5)
    assert found["eval_frechet_to_base"] == pytest.approx(0, abs=1e-9)


def test_the_documented_judge_works(monkeypatch, tmp_path, images):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "my_judges.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    judges = load_judges("model", load_reward("warmth"), names=["my_judges:Redness"])
    found = evaluate_images(images, ["a"] * 4, load_reward("warmth"), judges)
    assert found["eval_redness"] == pytest.approx(0.5)
    assert judges.better["redness"] == "neither"
    monkeypatch.delitem(sys.modules, "my_judges")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lpip", "did you mean 'lpips'.*allowed: clip, lpips, dreamsim, frechet"),
        ("absent:Judge", "cannot be imported.*put absent.py in the current folder"),
        ("mine:Absent", "module mine has no 'Absent'; check the name after the colon"),
        ("mine:constant", "is not a subclass of sqdf_fast.evaluate.Judge"),
    ],
)
def test_judges_that_cannot_be_had(module, name, message):
    with pytest.raises(UserError, match=message):
        load_judges("model", load_reward("warmth"), names=[name])


def test_available_judges():
    assert available_judges() == ("clip", "lpips", "dreamsim", "frechet")
