"""One object on a background: an analytic segmentation of any image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FRAME = 2
OBJECT_DISTANCE, OBJECT_SOFTNESS = 0.24, 0.03


@dataclass(frozen=True)
class Segmentation:
    """One object on a background, in B images.

    Attributes:
        mask: [B, 64, 64], the object's soft mask.
        background: [B, 3], mean RGB outside the mask.
        clutter: [B], standard deviation of the background around its mean RGB.
        diameter: [B], of the disc with the mask's area, in sides of the image.
        off_center: [B], distance of the mask's center from the image's, in sides.
        explained: [B], the part of the image's variance that two flat regions explain.
    """

    mask: torch.Tensor
    background: torch.Tensor
    clutter: torch.Tensor
    diameter: torch.Tensor
    off_center: torch.Tensor
    explained: torch.Tensor


def segment(images: torch.Tensor) -> Segmentation:
    """Split images [B, 3, H, W] into what differs from the median color of their frame, and the rest."""
    images = images.float()
    height, width = images.shape[-2:]
    inner = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    frame = images[:, :, ~inner].median(dim=2).values
    distance = (images - frame[:, :, None, None]).norm(dim=1)
    mask = torch.sigmoid((distance - OBJECT_DISTANCE) / OBJECT_SOFTNESS)
    area = mask.mean(dim=(1, 2)).clamp(min=1e-4)
    background, background_variance = _region(images, 1 - mask)
    fill, fill_variance = _region(images, mask)
    within = area * fill_variance + (1 - area) * background_variance
    between = area * (1 - area) * (fill - background).square().sum(dim=1)
    x = (torch.arange(width, device=images.device) + 0.5) / width - 0.5
    y = (torch.arange(height, device=images.device) + 0.5) / height - 0.5
    share = mask / mask.sum(dim=(1, 2), keepdim=True).clamp(min=1e-4)
    center_x, center_y = (share.sum(dim=1) * x).sum(dim=1), (share.sum(dim=2) * y).sum(dim=1)
    return Segmentation(
        mask=mask,
        background=background,
        clutter=(background_variance / 3).sqrt(),
        diameter=2 * (area / torch.pi).sqrt(),
        off_center=torch.hypot(center_x, center_y),
        explained=between / (between + within).clamp(min=1e-6),
    )


def _region(images: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean RGB [B, 3] of the weighted pixels and their summed variance around it [B]."""
    share = (weight / weight.sum(dim=(1, 2), keepdim=True).clamp(min=1e-4))[:, None]
    mean = (images * share).sum(dim=(2, 3))
    variance = ((images - mean[:, :, None, None]).square() * share).sum(dim=(1, 2, 3))
    return mean, variance
