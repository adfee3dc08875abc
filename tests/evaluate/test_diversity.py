from __future__ import annotations

import math

import pytest
import torch

from sqdf_fast.evaluate import ImageSet, Judges
from sqdf_fast.evaluate.diversity import EmbeddingDiversity, Vendi, VendiOfAll, mean_of_pairs, vendi_score
from sqdf_fast.evaluate.embedding import RewardFeatures, Thumbnails, embedding_of
from sqdf_fast.rewards.base import Reward


class Mean(Reward):
    name = "mean"

    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class WithFeatures(Mean):
    def features(self, images):
        return 7 * images.mean(dim=(2, 3))


class WithoutAfterAll(Mean):
    def features(self, images):
        return None


@pytest.fixture
def colored():
    """Red, darker red, green and blue: images whose features are parallel or orthogonal."""
    images = torch.zeros(4, 3, 4, 4)
    for index, (channel, level) in enumerate(((0, 1.0), (0, 0.5), (1, 0.9), (2, 0.8))):
        images[index, channel] = level
    return images


def test_vendi_of_equal_and_of_orthogonal_images():
    assert vendi_score(torch.ones(5, 5, dtype=torch.float64)) == pytest.approx(1, abs=1e-12)
    assert vendi_score(torch.eye(5, dtype=torch.float64)) == pytest.approx(5, abs=1e-12)
    # Two kinds, three to one: eigenvalues 3/4 and 1/4.
    kinds = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1)).double()
    assert vendi_score(kinds) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), abs=1e-12)


def test_vendi_of_two_images_by_their_cosine():
    # Eigenvalues of [[1, c], [c, 1]] / 2 are (1 + c) / 2 and (1 - c) / 2.
    for cosine in (0.0, 0.3, 0.9):
        entropy = -sum(p * math.log(p) for p in ((1 + cosine) / 2, (1 - cosine) / 2))
        found = vendi_score(torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64))
        assert found == pytest.approx(math.exp(entropy), abs=1e-12)


def test_vendi_judges(colored):
    image_set = ImageSet(colored, ["a", "a", "b", "b"], RewardFeatures(WithFeatures()))
    assert Vendi().values(image_set).numbers == pytest.approx([1, 2], abs=1e-6)
    assert Vendi()(image_set).value == pytest.approx(1.5, abs=1e-6)
    of_all = VendiOfAll()(image_set)
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert of_all.value == pytest.approx(math.exp(entropy), abs=1e-6)
    assert (of_all.low, of_all.high) == (None, None)
    assert Vendi()(ImageSet(colored, ["a", "b", "c", "d"], Thumbnails())) is None


def test_diversity_in_the_rewards_features(colored):
    def diversity(prompts):
        found = EmbeddingDiversity()(ImageSet(colored, prompts, embedding_of(WithFeatures())))
        return found and found.value

    assert diversity(["a", "a", "b", "b"]) == pytest.approx(0.5, abs=1e-6)
    assert diversity(["a"] * 4) == pytest.approx(5 / 6, abs=1e-6)
    assert diversity(["a", "b", "c", "d"]) is None
    judges = Judges([EmbeddingDiversity()], embedding_of(WithFeatures()))
    assert judges.diversity_measure == "features of the reward 'mean' (1 - cosine)"


def test_a_reward_whose_features_are_none_gives_thumbnails():
    images = torch.stack([torch.full((3, 32, 32), level) for level in (0.2, 0.5)])
    embedding = embedding_of(WithoutAfterAll())
    image_set = ImageSet(images, ["a", "a"], embedding)
    assert EmbeddingDiversity()(image_set).value == pytest.approx(0.3, abs=1e-6)
    assert Vendi()(image_set).value == Vendi()(ImageSet(images, ["a", "a"], Thumbnails())).value
    assert embedding.description == Thumbnails.description


def test_diversity_in_thumbnails():
    assert isinstance(embedding_of(Mean()), Thumbnails)
    assert Thumbnails.description.startswith("thumbnails of 16 x 16 pixels")

    def diversity(images):
        return EmbeddingDiversity()(ImageSet(images, ["a"] * len(images), Thumbnails())).value

    flat = torch.tensor([0.2, 0.5, 0.5])[:, None, None, None].expand(3, 3, 48, 32)
    assert diversity(flat[:2]) == pytest.approx(0.3, abs=1e-6)
    assert diversity(flat[1:]) == 0.0
    assert diversity(flat) == pytest.approx(0.2, abs=1e-6)
    # Detail finer than a thumbnail's pixel is not diversity.
    checkers = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    assert diversity(torch.cat([checkers, 1 - checkers])) == pytest.approx(0.0, abs=1e-6)


def test_similarity_of_thumbnails_is_a_gaussian_of_their_distance():
    a, b = torch.zeros(1, 12, dtype=torch.float64), torch.full((1, 12), 0.4, dtype=torch.float64)
    assert Thumbnails().similarities(a, b).item() == pytest.approx(math.exp(-2), abs=1e-12)
    assert Thumbnails().similarities(b, b).item() == 1.0


def test_mean_of_pairs_leaves_the_diagonal_out():
    assert mean_of_pairs(torch.tensor([[9.0, 1, 2], [1, 9, 3], [2, 3, 9]])) == 2.0
