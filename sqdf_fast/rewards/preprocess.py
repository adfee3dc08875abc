"""From an image in [0, 1] to what a CLIP-like network expects, with a gradient, and to 8-bit images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sqdf_fast.rewards.base import exact

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class _StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient is the identity: a saturated pixel can still be pulled back."""

    @staticmethod
    def forward(context: object, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient


def saturate(images: Tensor) -> Tensor:
    """Values clamped to [0, 1], gradient passed through unchanged. Any shape, floating dtype."""
    return _StraightThroughClamp.apply(images)


def preprocess(images: Tensor, size: int) -> Tensor:
    """Bicubic antialiased resize of the shorter edge to ``size``, center crop, CLIP's normalization.

    The numbers of the PIL path of CLIP's image processor, up to its rounding to 8 bits, with a gradient.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: side of the square that the network sees, in pixels.

    Returns:
        [B, 3, size, size], float32 (float64 for float64 images), also for images in half precision.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    # Integer arithmetic, as PIL's callers do: a float ratio can be one pixel off.
    rows, columns = size * height // shorter, size * width // shorter
    top, left = (rows - size) // 2, (columns - size) // 2
    images = _resize(images, (rows, columns))[..., top : top + size, left : left + size]
    return _normalize(images, CLIP_MEAN, CLIP_STD)


def stretch(images: Tensor, size: int) -> Tensor:
    """Bicubic antialiased resize of both edges to ``size``, whatever the image's shape, to [-1, 1].

    The numbers of the PIL path of SigLIP's image processor, up to its rounding to 8 bits, with a gradient. (Pillow 13
    takes tall images along y first; at hard edges of those its numbers differ.)

    Args and returns: as :func:`preprocess`.
    """
    half = (0.5, 0.5, 0.5)
    return _normalize(_resize(images, (size, size)), half, half)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Bicubic antialiased resize of the longer edge to ``size``, black borders, CLIP's normalization.

    HPSv2's validation transform (``ResizeMaxSize`` in github.com/tgxs002/HPSv2), which resizes float images: what
    bicubic weights overshoot at edges is kept, unlike in :func:`preprocess`. Antialiased, as torchvision >= 0.17
    resizes tensors.

    Args and returns: as :func:`preprocess`.
    """
    images = saturate(images.to(exact(images.dtype)))
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    resized = (max(1, round(height * scale)), max(1, round(width * scale)))
    if resized != (height, width):
        images = F.interpolate(images, resized, mode="bicubic", antialias=True)
    rows, columns = size - resized[0], size - resized[1]
    images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return _normalize(images, CLIP_MEAN, CLIP_STD)


def _resize(images: Tensor, resized: tuple[int, int]) -> Tensor:
    """As PIL resizes 8-bit images: values stay in [0, 1]. float32, or float64 for float64 images."""
    images = saturate(images.to(exact(images.dtype)))
    # Bicubic weights overshoot at edges. PIL resizes along x, then along y, and saturates after each.
    for step in ((images.shape[-2], resized[1]), resized):
        if step != tuple(images.shape[-2:]):
            images = saturate(F.interpolate(images, step, mode="bicubic", antialias=True))
    return images


def _normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    center, scale = torch.tensor([mean, std], dtype=images.dtype, device=images.device)[:, :, None, None]
    return (images - center) / scale


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit RGB images of float [B, 3, H, W] in [0, 1], rounded to the nearest level."""
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]
