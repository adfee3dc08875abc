from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sqdf_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, letterbox, preprocess, saturate, stretch, to_pil

STD = torch.tensor(CLIP_STD)[:, None, None]
MEAN = torch.tensor(CLIP_MEAN)[:, None, None]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
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


def noise(height: int, width: int) -> Image.Image:
    """Every 8-bit value at every pixel."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("draw", [photo, noise])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 224), (512, 512, 224), (300, 241, 224), (97, 160, 56), (33, 50, 33)],
)
def test_parity_with_the_pil_path(draw, height, width, size):
    image = draw(height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    found = preprocess(as_tensor(image), size)[0]
    assert found.shape == expected.shape == (3, size, size)
    levels = (found - expected) * STD * 255
    # PIL rounds to 8 bits after each of its two passes; nothing else may differ.
    assert levels.abs().max() < 1.6
    assert levels.abs().mean() < 0.5


@pytest.mark.parametrize("draw", [photo, noise])
@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 384), (512, 512, 384), (241, 300, 224), (97, 160, 56)])
def test_stretch_parity_with_the_pil_path_of_siglip(draw, height, width, size):
    image = draw(height, width)
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    found = stretch(as_tensor(image), size)[0]
    assert found.shape == expected.shape == (3, size, size)
    levels = (found - expected) * 0.5 * 255
    # PIL rounds to 8 bits after each of its two passes; nothing else may differ.
    assert levels.abs().max() < 1.6
    assert levels.abs().mean() < 0.5


@pytest.mark.parametrize("draw", [photo, noise])
@pytest.mark.parametrize(("height", "width", "size"), [(300, 241, 224), (768, 512, 384)])
def test_stretch_of_a_tall_image_goes_along_x_first(draw, height, width, size):
    image = draw(height, width)
    # Pillow 13 takes a tall image along y first, which it did not when the head was trained.
    steps = image.resize((size, height), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    levels = (stretch(as_tensor(image), size)[0] * 0.5 + 0.5 - as_tensor(steps)[0]) * 255
    assert levels.abs().max() < 1.6


def test_fitting_images_are_only_normalised():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(preprocess(images, 8), (images - MEAN) / STD, rtol=0, atol=1e-7)


def test_crop_is_the_center():
    images = torch.zeros(1, 3, 4, 10)
    images[..., 3:7] = 1
    assert preprocess(images, 4).eq((1 - MEAN) / STD).all()


BOXES = [
    ((64, 64), (224, 224), (0, 0)),
    ((512, 512), (224, 224), (0, 0)),
    ((300, 240), (224, 179), (0, 22)),
    ((97, 160), (136, 224), (44, 0)),
    ((30, 224), (30, 224), (97, 0)),
]


@pytest.mark.parametrize("draw", [photo, noise])
@pytest.mark.parametrize(("before", "resized", "corner"), BOXES)
def test_letterbox_is_the_published_transform_of_hpsv2(draw, before, resized, corner):
    image = draw(*before)
    found = letterbox(as_tensor(image).double(), 224)[0] * STD + MEAN
    assert found.shape == (3, 224, 224)
    # Positions between pixels are float32 for float32 images.
    single = letterbox(as_tensor(image), 224)[0] * STD + MEAN
    torch.testing.assert_close(single.double(), found, rtol=0, atol=3e-5)
    top, left = corner
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[top : top + resized[0], left : left + resized[1]] = True
    assert found[:, ~inside].abs().lt(1e-6).all()
    # PIL resizes images of floats with the same weights and rounds nothing, as the published code does.
    for channel, band in zip(found, image.split(), strict=True):
        levels = np.asarray(band.convert("F").resize(resized[::-1], Image.Resampling.BICUBIC))
        expected = torch.from_numpy(levels.copy()).flatten().double() / 255
        torch.testing.assert_close(channel[inside], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("before", "resized", "corner"), BOXES)
def test_letterbox_parity_with_the_8_bit_pil_path(before, resized, corner):
    # Away from black and white, where PIL would cut off what bicubic weights overshoot.
    image = Image.fromarray((64 + 0.5 * np.asarray(photo(*before))).round().astype(np.uint8))
    pasted = Image.new("RGB", (224, 224))
    pasted.paste(image.resize(resized[::-1], Image.Resampling.BICUBIC), corner[::-1])
    levels = (letterbox(as_tensor(image), 224)[0] * STD + MEAN - as_tensor(pasted)[0]) * 255
    # PIL rounds to 8 bits after each of its two passes; nothing else may differ.
    assert levels.abs().max() < 1.6
    assert levels.abs().mean() < 0.5


def test_letterbox_gradient_matches_finite_differences():
    images = 0.2 + 0.6 * torch.rand(1, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: letterbox(x, 6), images.requires_grad_())
    assert letterbox(images, 6).dtype == torch.float64
    assert letterbox(images.bfloat16(), 6).dtype == torch.float32


def test_letterbox_keeps_a_row_of_the_thinnest_image():
    found = letterbox(torch.ones(1, 3, 1, 900), 30)[0] - (0 - MEAN) / STD
    assert found.any(dim=2).nonzero()[:, 1].tolist() == [14, 14, 14]
    torch.testing.assert_close(found[:, 14] * STD[:, 0], torch.ones(3, 30))


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
    exact = photo(20, 30)
    assert np.array_equal(np.asarray(to_pil(as_tensor(exact))[0]), np.asarray(exact))
