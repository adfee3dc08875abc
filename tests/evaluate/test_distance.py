from __future__ import annotations

import pytest
import torch

from sqdf_fast.evaluate import ImageSet
from sqdf_fast.evaluate.distance import FrechetDistance, KernelDistance, frechet_distance, kernel_distance
from sqdf_fast.evaluate.embedding import RewardFeatures, Thumbnails
from sqdf_fast.rewards.base import Reward


def gaussian(mean, covariance, seed, count=40):
    """Rows whose sample mean and covariance are exactly those given."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    rows -= rows.mean(dim=0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / (count - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    zero, shift = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    narrow = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    wide = torch.diag(torch.tensor([4.0, 1.0, 16.0], dtype=torch.float64))
    a, b = gaussian(zero, narrow, 0), gaussian(shift, wide, 1, count=60)
    # Diagonal covariances commute: the sum of (s_a - s_b)^2.
    assert frechet_distance(a, b) == pytest.approx(5.25 + 1 + 1 + 1, abs=1e-10)
    assert frechet_distance(a, gaussian(shift, narrow, 2)) == pytest.approx(5.25, abs=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    one = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    two = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    # tr (A B)^(1/2) of two rows and columns is (tr AB + 2 det(AB)^(1/2))^(1/2).
    product = one @ two
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(gaussian(zero, one, 0), gaussian(zero, two, 1))
    assert found == pytest.approx(float(one.trace() + two.trace() - 2 * root), abs=1e-10)


def test_frechet_distance_with_fewer_images_than_numbers():
    a = torch.randn(5, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 1) == pytest.approx(30, abs=1e-10)


class Colors(Reward):
    """Features are the mean colors."""

    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

    def features(self, images):
        return images.mean(dim=(2, 3))


def of_vectors(vectors, prompts, base):
    """Images whose embeddings are ``vectors``."""
    images = torch.as_tensor(vectors, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)
    return ImageSet(images, prompts, RewardFeatures(Colors()), base=torch.as_tensor(base, dtype=torch.float64))


def test_kernel_distance_by_hand():
    red, green = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    # k = 8 between equal and 1 between orthogonal unit vectors: 8 + 8 - 1 - 1.
    found = KernelDistance()(of_vectors([red, red], ["a", "b"], [green, green]))
    assert found.value == pytest.approx(14, abs=1e-6)
    # One of two kept: k(x, x') = 1, k(y, y') = 8, k(x, y') = 8, k(x', y) = 1.
    found = KernelDistance()(of_vectors([green, red], ["a", "b"], [green, green]))
    assert found.value == pytest.approx(0, abs=1e-6)
    assert KernelDistance()(ImageSet(torch.zeros(2, 3, 4, 4), ["a", "b"], Thumbnails())) is None


def test_kernel_distance_leaves_pairs_of_one_prompt_out():
    terms = torch.tensor([[0.0, 100, 1, 2], [100, 0, 3, 4], [1, 3, 0, 100], [2, 4, 100, 0]], dtype=torch.float64)
    found = kernel_distance(terms, ["a", "a", "b", "b"])
    # Two prompts: every resample that holds both is the sample itself.
    assert (found.value, found.low, found.high) == (2.5, 2.5, 2.5)
    assert kernel_distance(terms, ["a"] * 4).value == pytest.approx(210 * 2 / 12)
    assert kernel_distance(terms[:1, :1], ["a"]) is None


def test_kernel_distance_is_without_bias_and_zero_between_equal_sets():
    generator = torch.Generator().manual_seed(0)
    prompts = [f"prompt {index // 4}" for index in range(128)]
    found = []
    for _ in range(60):
        a, b = (torch.rand(128, 3, generator=generator) for _ in range(2))
        base = torch.nn.functional.normalize(b.double(), dim=1)
        found.append(KernelDistance()(of_vectors(a, prompts, base)).value)
    mean, error = torch.tensor(found).mean().item(), torch.tensor(found).std().item() / 60**0.5
    assert abs(mean) < 3 * error
    assert KernelDistance()(of_vectors(b, prompts, base)).value == pytest.approx(0, abs=1e-6)


def test_interval_holds_a_clear_distance_and_repeats():
    generator = torch.Generator().manual_seed(1)
    prompts = [f"prompt {index // 4}" for index in range(64)]
    a, b = torch.rand(64, 3, generator=generator), torch.rand(64, 3, generator=generator)
    a[:, 0] += 1
    base = torch.nn.functional.normalize(b.double(), dim=1)
    found = KernelDistance()(of_vectors(a, prompts, base))
    assert 0 < found.low < found.value < found.high
    assert found == KernelDistance()(of_vectors(a, prompts, base))


def test_frechet_judge():
    base = torch.eye(3, dtype=torch.float64)
    assert FrechetDistance()(of_vectors(base, ["a", "b", "c"], base)).value == pytest.approx(0, abs=1e-6)
    assert FrechetDistance()(ImageSet(torch.zeros(2, 3, 4, 4), ["a", "b"], Thumbnails())) is None
