"""JPEG compressibility: how small an image gets."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.preprocess import to_pil


class JpegCompressibility(Reward):
    """Minus the kilobytes (1000 bytes) of the image as JPEG at quality 95 (Black et al., arXiv 2305.13301).

    It has no gradient: it can be evaluated, and optimized as a black box.
    """

    name = "jpeg"
    differentiable = False

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes = []
        for image in to_pil(images):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=95)
            sizes.append(-buffer.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)
