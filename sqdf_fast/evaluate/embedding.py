"""Spaces in which images are compared: how far apart they are, and how alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sqdf_fast.rewards import Reward

PIXEL_SIDE = 16
# Root mean square difference of two thumbnails at which they count as fairly different, of a range of 1.
PIXEL_WIDTH = 0.2


class Embedding:
    """Images as vectors.

    Attributes:
        description: what is compared, in a few words.
    """

    description: str

    def __call__(self, images: Tensor) -> Tensor:
        """Float [B, 3, H, W] in [0, 1] to float64 [B, F] on the CPU."""
        raise NotImplementedError

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Between embeddings [A, F] and [B, F]: [A, B], 0 for equal ones."""
        raise NotImplementedError

    def similarities(self, a: Tensor, b: Tensor) -> Tensor:
        """A positive semi-definite kernel [A, B], 1 for equal embeddings."""
        raise NotImplementedError


class RewardFeatures(Embedding):
    """Unit vectors of the reward's own backbone: distance 1 - cosine in [0, 2], similarity the cosine.

    Thumbnails once the reward turns out to have no features.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self._fallback: Embedding | None = None
        self.description = f"features of the reward {reward.name!r} (1 - cosine)"

    def __call__(self, images: Tensor) -> Tensor:
        features = None if self._fallback else self.reward.features(images)
        if features is not None:
            return F.normalize(features.double().cpu(), dim=1)
        self._fallback = self._fallback or Thumbnails()
        self.description = self._fallback.description
        return self._fallback(images)

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        return self._fallback.distances(a, b) if self._fallback else 1 - a @ b.T

    def similarities(self, a: Tensor, b: Tensor) -> Tensor:
        return self._fallback.similarities(a, b) if self._fallback else a @ b.T


class Coordinates(Embedding):
    """Vectors of comparable numbers: distance the root mean square difference, similarity a Gaussian of it.

    Args:
        width: the distance at which the similarity has fallen to exp(-1/2).
    """

    def __init__(self, width: float) -> None:
        self.width = width

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        # The way through a matrix product leaves 1e-8 between equal vectors.
        euclidean = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return euclidean / a.shape[1] ** 0.5

    def similarities(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(self.distances(a, b) / self.width).square() / 2)


class Thumbnails(Coordinates):
    """Images scaled to 16 x 16 pixels; distances in [0, 1]. Needs no network."""

    description = f"thumbnails of {PIXEL_SIDE} x {PIXEL_SIDE} pixels (root mean square difference)"

    def __init__(self) -> None:
        super().__init__(PIXEL_WIDTH)

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), PIXEL_SIDE).flatten(1).double().cpu()


def embedding_of(reward: Reward) -> Embedding:
    """The reward's own features, or thumbnails where it has none."""
    return Thumbnails() if type(reward).features is Reward.features else RewardFeatures(reward)
