"""LPIPS and DreamSim on stand-ins of their packages: the weights are downloaded, the packages optional."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import ImageSet
from sqdf_fast.evaluate.embedding import Thumbnails
from sqdf_fast.evaluate.perceptual import DreamSimDiversity, LpipsDiversity


class PixelLpips(nn.Module):
    """The interface of lpips.LPIPS; the distance is that of the mean pixels, in the units of [-1, 1]."""

    def __init__(self, net="alex", verbose=True):
        super().__init__()
        assert not verbose
        self.net = net

    def forward(self, in0, in1, retPerLayer=False, normalize=False):  # noqa: N803
        assert normalize
        return 2 * (in0 - in1).mean(dim=(1, 2, 3), keepdim=True).abs()


class ColorDreamSim(nn.Module):
    """The interface of dreamsim's model: embeddings are mean colors, parts know the device they were made for."""

    def __init__(self):
        super().__init__()
        self.extractor = nn.Identity()
        self.extractor.device = "cpu"

    def embed(self, images):
        assert images.shape[1:] == (3, 224, 224)
        return images.mean(dim=(2, 3))


@pytest.fixture
def image_set():
    images = torch.zeros(5, 3, 32, 32)
    for index, level in enumerate((0.0, 0.1, 0.4)):
        images[index] = level
    images[3, 0], images[4, 1] = 1, 0.5
    return ImageSet(images, ["a", "a", "a", "b", "b"], Thumbnails(), batch_size=2)


def test_lpips(monkeypatch, image_set):
    package = ModuleType("lpips")
    package.LPIPS = PixelLpips
    monkeypatch.setitem(sys.modules, "lpips", package)
    judge = LpipsDiversity.load(net="vgg", dtype=torch.bfloat16)
    assert judge.network.net == "vgg"
    # Pairs of a: 0.2, 0.8, 0.6; of b: 2 * (1/3 - 1/6).
    assert judge.values(image_set).numbers == pytest.approx([1.6 / 3, 1 / 3])
    assert judge(image_set).value == pytest.approx((1.6 / 3 + 1 / 3) / 2)


def test_dreamsim(monkeypatch, image_set, tmp_path):
    asked = {}

    def dreamsim(**options):
        asked.update(options)
        return ColorDreamSim(), None

    package = ModuleType("dreamsim")
    package.dreamsim = dreamsim
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    judge = DreamSimDiversity.load(cache_dir=str(tmp_path / "hub" / "weights"), dreamsim_type="dino_vitb16")
    assert asked == {
        "pretrained": True,
        "device": "cpu",
        "cache_dir": str(tmp_path / "hub" / "weights"),
        "dreamsim_type": "dino_vitb16",
    }
    # The package makes the last folder only.
    assert (tmp_path / "hub").is_dir()
    some = ImageSet(image_set.images[1:], ["a", "a", "b", "b"], Thumbnails(), batch_size=1)
    # Greys are parallel, red and green orthogonal.
    assert judge.values(some).numbers == pytest.approx([0, 1], abs=1e-6)


def test_dreamsims_extractors_know_where_they_are():
    judge = DreamSimDiversity(ColorDreamSim())
    extractor = judge.network.extractor
    with judge.at(torch.device("meta")):
        assert extractor.device == torch.device("meta")
    assert extractor.device == "cpu"


@pytest.mark.parametrize(("judge", "package"), [(LpipsDiversity, "lpips"), (DreamSimDiversity, "dreamsim")])
def test_without_the_package(monkeypatch, judge, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}.*sqdf-fast\[judges\]"):
        judge.load()


def test_without_the_weights(monkeypatch):
    def offline(**options):
        raise OSError("no network")

    package = ModuleType("lpips")
    package.LPIPS = offline
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(UserError, match=r"weights cannot be loaded \(OSError: no network\).*go online once"):
        LpipsDiversity.load()
