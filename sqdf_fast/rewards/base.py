"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Reward(nn.Module):
    """A score r(image, prompt), the higher the better. Subclasses implement ``forward``.

    A subclass may have two more constructors, class methods: ``load(**options)``, used in place of the ordinary one,
    and ``from_config(*, device, dtype)``, which builds the same modules without weights, for simulating its memory.

    Attributes:
        name: name in reports.
        differentiable: whether the score has a gradient with respect to the images.
        checkpointed_block_types: class names of the blocks that gradient checkpointing may act on.
    """

    name: str = "reward"
    differentiable: bool = True
    checkpointed_block_types: frozenset[str] = frozenset()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score every image on its own.

        Args:
            images: float [B, 3, H, W] in [0, 1]; a policy may leave the interval a little.
            prompts: B prompts.

        Returns:
            float32 [B] (float64 for float64 images).
        """
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Compute once what the score needs of these prompts; a reward that does not read them does nothing."""

    def drop_text_tower(self) -> None:
        """Free what only serves new prompts. A prompt not encoded by then may cost time, but no device memory."""

    def features(self, images: Tensor) -> Tensor | None:
        """Embeddings [B, F] in which images can be compared, or None where the reward has none."""
        return None

    def parts(self) -> Sequence[Reward]:
        """The rewards of a sum; empty for every other."""
        return ()


class FunctionReward(Reward):
    """A plain function ``(images, prompts) -> [B]`` as a reward; it may carry ``differentiable = False``."""

    def __init__(self, function: Callable[..., Tensor], name: str, options: dict[str, object]) -> None:
        super().__init__()
        self.name = name
        self.differentiable = getattr(function, "differentiable", True)
        self.function = function
        self.options = options

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts, **self.options)


def exact(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, heads and text features beside ``dtype``: float32; float64 for float64, for exact gradients."""
    return torch.promote_types(dtype, torch.float32)


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings [B, F] divided by their norms."""
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
