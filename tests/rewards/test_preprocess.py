from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sqdf_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, preprocess, saturate, to_pil

STD = torch.tensor(CLIP_STD)[:, None, None]
MEAN = torch.tensor(CLIP_MEAN)[:, None, None]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth waves, hard black and white edges and noise, in 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 120 * np.sin(x / 7)[..., None] * np.cos(y / 5)[..., None] * np.array([1.0, 0.5, -1.0])
    waves[: height // 3, : width // 3] = 255
    waves[-height // 4 :, -width // 4 :] = 0
    noisy = waves + rng.normal(0, 12, (height, width, 3)) * (x[..., None] > width // 2)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 224), (512, 512, 224), (300, 241, 224), (97, 160, 56), (33, 50, 33)],
)
def test_parity_with_the_pil_path(height, width, size):
    image = picture(height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    found = preprocess(as_tensor(image), size)[0]
    assert found.shape == expected.shape == (3, size, size)
    levels = (found - expected) * STD * 255
    # PIL rounds to 8 bits after each of its two passes; nothing else may differ.
    assert levels.abs().max() < 1.6
    assert levels.abs().mean() < 0.5


def test_fitting_pictures_are_only_normalised():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(preprocess(images, 8), (images - MEAN) / STD, rtol=0, atol=1e-7)


def test_crop_is_the_centre():
    images = torch.zeros(1, 3, 4, 10)
    images[..., 3:7] = 1
    assert preprocess(images, 4, (0, 0, 0), (1, 1, 1)).eq(1).all()


def test_gradient_matches_finite_differences():
    images = 0.2 + 0.6 * torch.rand(1, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: preprocess(x, 6), images.requires_grad_())
    assert preprocess(images, 6).dtype == torch.float64


def test_saturated_pixels_keep_their_gradient():
    images = torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.7], requires_grad=True)
    values = saturate(images)
    assert values.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    (gradient,) = torch.autograd.grad((values * torch.arange(1.0, 6.0)).sum(), images)
    assert gradient.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    white = torch.full((1, 3, 16, 16), 1.2, requires_grad=True)
    (pulled,) = torch.autograd.grad(preprocess(white, 8).sum(), white)
    assert pulled.ne(0).all()


def test_half_precision_is_not_used_for_pixels():
    images = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = preprocess(images, 12)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, preprocess(images.float(), 12), rtol=0, atol=0)


def test_to_pil_rounds_to_the_nearest_level():
    images = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 2.0])[None, None, None].expand(
        2, 3, 1, 6
    )
    first, second = to_pil(images)
    assert np.asarray(first)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert first.mode == second.mode == "RGB"
    assert first.size == (6, 1)
    exact = picture(20, 30)
    assert np.array_equal(np.asarray(to_pil(as_tensor(exact))[0]), np.asarray(exact))
