"""Diversity by published perceptual distances, of packages that load their weights at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate.diversity import mean_of_pairs
from sqdf_fast.evaluate.judge import ImageSet, PromptJudge

DREAMSIM_SIDE = 224


class LpipsDiversity(PromptJudge):
    """Mean LPIPS distance of two images of the same prompt.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924.

    Args:
        network: (a, b, normalize=True) to distances [B, 1, 1, 1] of images [B, 3, H, W] in [0, 1].
    """

    name = "lpips_diversity"

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, *, dtype: torch.dtype = torch.float32, net: str = "alex", **options: Any) -> LpipsDiversity:
        """The published weights, in float32.

        Args:
            net: the trunk: alex (the authors' advice for comparing images), vgg or squeeze.

        Raises:
            UserError: the package or its weights are missing.
        """
        return cls(_loaded("lpips", cls.name, lambda package: package.LPIPS(net=net, verbose=False, **options)))

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        assert self.network is not None
        first, second = torch.triu_indices(len(rows), len(rows), offset=1)
        images = image_set.images[rows].float()
        distances = [
            self.network(images[a], images[b], normalize=True).flatten().double().cpu()
            for a, b in zip(first.split(image_set.batch_size), second.split(image_set.batch_size), strict=True)
        ]
        return float(torch.cat(distances).mean())


class DreamSimDiversity(PromptJudge):
    """Mean DreamSim distance of two images of the same prompt, 1 - cosine of its embeddings.

    Fu et al., "DreamSim: Learning New Dimensions of Human Visual Similarity using Synthetic Data", arXiv 2306.09344.

    Args:
        network: has ``embed``: images [B, 3, 224, 224] in [0, 1] to [B, F].
    """

    name = "dreamsim_diversity"

    def __init__(self, network: Any) -> None:
        self.network: Any = network.eval().requires_grad_(False)
        self.embed: Callable[[Tensor], Tensor] = network.embed

    @classmethod
    def load(
        cls, *, dtype: torch.dtype = torch.float32, cache_dir: str | None = None, **options: Any
    ) -> DreamSimDiversity:
        """The published weights, in float32.

        Args:
            cache_dir: where the package keeps them; default: ``dreamsim`` in torch.hub's folder.
            options: of the package's ``dreamsim``, such as ``dreamsim_type``.

        Raises:
            UserError: the package or its weights are missing.
        """
        folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "dreamsim"

        def network(package: Any) -> nn.Module:
            folder.parent.mkdir(parents=True, exist_ok=True)
            return package.dreamsim(pretrained=True, device="cpu", cache_dir=str(folder), **options)[0]

        return cls(_loaded("dreamsim", cls.name, network))

    @contextmanager
    def at(self, device: torch.device) -> Iterator[None]:
        # The package's extractors move their projections to the device that they were made for.
        extractors = [module for module in self.network.modules() if "device" in vars(module)]
        homes = [module.device for module in extractors]
        try:
            with super().at(device):
                for module in extractors:
                    module.device = device
                yield
        finally:
            for module, home in zip(extractors, homes, strict=True):
                module.device = home

    def of_prompt(self, image_set: ImageSet, rows: list[int]) -> float:
        side = (DREAMSIM_SIDE, DREAMSIM_SIDE)
        embeddings = [
            self.embed(F.interpolate(batch.float(), side, mode="bicubic", antialias=True).clamp(0, 1))
            for batch in image_set.images[rows].split(image_set.batch_size)
        ]
        unit = F.normalize(torch.cat([part.double().cpu() for part in embeddings]), dim=1)
        return mean_of_pairs(1 - unit @ unit.T)


def _loaded(name: str, judge: str, load: Callable[[Any], nn.Module]) -> nn.Module:
    """What ``load`` makes of the package ``name``."""
    try:
        package = import_module(name)
    except ImportError as error:
        raise UserError(
            f"judge {judge} needs the package {name} ({error}); install it with: pip install 'sqdf-fast[judges]'"
        ) from None
    try:
        return load(package)
    except Exception as error:
        raise UserError(
            f"judge {judge}: its weights cannot be loaded ({type(error).__name__}: {error}); they are downloaded at "
            "the first use, so go online once, or leave the judge out"
        ) from error
