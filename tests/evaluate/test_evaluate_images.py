from __future__ import annotations

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import EmbeddingJudges, Judges, bootstrap_interval, evaluate_images
from sqdf_fast.rewards.base import FunctionReward, Reward

PROMPTS = ["red", "red", "green", "green", "blue", "blue"]


class Brightness(Reward):
    name = "brightness"

    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class ColourJudges(Judges):
    """Alignment is the amount of the named colour; remembers the batches that it saw."""

    def __init__(self) -> None:
        self.batches = []

    def true_reward(self, images, prompts):
        return -images.amax(dim=(1, 2, 3))

    def alignment(self, images, prompts):
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.mean(dim=(2, 3))[range(len(prompts)), [["red", "green", "blue"].index(p) for p in prompts]]

    def attribute_accuracy(self, images, prompts):
        return 0.75

    def diversity(self, images, prompts):
        return 1.5


@pytest.fixture
def images():
    """Each shows its prompt's colour at a level of its own."""
    pictures = torch.zeros(6, 3, 4, 4)
    for index, level in enumerate((0.2, 0.4, 0.6, 0.8, 0.9, 1.0)):
        pictures[index, index // 2] = level
    return pictures


def test_values(images):
    found = evaluate_images(images, PROMPTS, Brightness(), ColourJudges())
    proxy = [level / 3 for level in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)]
    assert found["eval_proxy_reward"] == pytest.approx(0.65 / 3)
    assert found["eval_proxy_reward_std"] == pytest.approx(torch.tensor(proxy).std().item())
    assert found["eval_true_reward"] == pytest.approx(-0.65)
    assert found["eval_alignment"] == pytest.approx(0.65)
    assert found["eval_alignment_shuffled"] == 0.0
    assert found["eval_attribute_accuracy"] == 0.75
    assert found["eval_diversity"] == 1.5
    low, high = bootstrap_interval(proxy, PROMPTS)
    assert found["eval_proxy_reward_low"] == pytest.approx(low)
    assert found["eval_proxy_reward_high"] == pytest.approx(high)
    assert found["eval_true_reward_low"] < -0.65 < found["eval_true_reward_high"]
    assert {type(value) for value in found.values()} == {float}


def test_batches_do_not_change_the_values(images):
    judges = ColourJudges()
    found = evaluate_images(images, PROMPTS, Brightness(), judges, batch_size=4)
    assert found == evaluate_images(images, PROMPTS, Brightness(), ColourJudges())
    # Once under its own prompts, then under each of the two others.
    assert judges.batches == [4, 2] * 3


def test_unknown_is_none(images):
    found = evaluate_images(images, PROMPTS, Brightness(), Judges())
    assert {name for name, value in found.items() if value is not None} == {
        "eval_proxy_reward",
        "eval_proxy_reward_std",
        "eval_proxy_reward_low",
        "eval_proxy_reward_high",
    }
    assert {"eval_true_reward", "eval_alignment_shuffled", "eval_diversity"} <= found.keys()


def test_one_prompt_has_no_shuffled_baseline(images):
    found = evaluate_images(images, ["red"] * 6, Brightness(), ColourJudges())
    assert found["eval_alignment_shuffled"] is None
    assert evaluate_images(images[:1], ["red"], Brightness(), ColourJudges())["eval_proxy_reward_std"] == 0.0


def test_reward_that_fails_is_refused(images):
    broken = FunctionReward(lambda x, p: x.mean(dim=(1, 2, 3)) / 0, "broken", {})
    with pytest.raises(UserError, match="'broken' returned"):
        evaluate_images(images, PROMPTS, broken, Judges())


class WithFeatures(Brightness):
    def features(self, images):
        return 7 * images.mean(dim=(2, 3))


def test_diversity_in_the_rewards_features(images):
    judges = EmbeddingJudges(WithFeatures())
    assert judges.diversity_measure == "features of the reward 'brightness' (1 - cosine)"
    # Red and red are parallel, green and blue orthogonal.
    mixed = images[[0, 1, 2, 4]]
    assert judges.diversity(mixed, ["a", "a", "b", "b"]) == pytest.approx(0.5, abs=1e-6)
    assert judges.diversity(mixed, ["a", "a", "a", "a"]) == pytest.approx(5 / 6, abs=1e-6)
    assert judges.diversity(mixed, ["a", "b", "c", "d"]) is None


def test_diversity_in_thumbnails(images):
    judges = EmbeddingJudges(Brightness())
    assert judges.diversity_measure.startswith("thumbnails of 16 x 16 pixels")
    flat = torch.tensor([0.2, 0.5, 0.5])[:, None, None, None].expand(3, 3, 48, 32)
    assert judges.diversity(flat[:2], ["a", "a"]) == pytest.approx(0.3, abs=1e-6)
    assert judges.diversity(flat[1:], ["a", "a"]) == 0.0
    assert judges.diversity(flat, ["a", "a", "a"]) == pytest.approx(0.2, abs=1e-6)
    # Detail finer than a thumbnail's pixel is not diversity.
    checkers = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    assert judges.diversity(torch.cat([checkers, 1 - checkers]), ["a", "a"]) == pytest.approx(0.0, abs=1e-6)
