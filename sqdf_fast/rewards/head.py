"""Published heads: Linear layers without activation, multiplied out, and rewards that are such a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError, first_line
from sqdf_fast.rewards.base import Reward, exact, unit
from sqdf_fast.rewards.published import PublishedFile


class HeadReward(Reward):
    """r(x) = w . e / |e| + b, e the embedding of x: subclasses implement ``embed``. The prompt is not read.

    Args:
        vision: image tower; its dtype is that of the network's arithmetic.
        head: layer from its embeddings to one number, float32 or float64; the score is of that dtype.

    Class attributes:
        file: the published head; layers: names of its Linear layers; the others are dropout, idle at inference.
        backbone: hub id of the tower that the published head belongs to.
    """

    file: ClassVar[PublishedFile]
    layers: ClassVar[Sequence[str]]
    backbone: ClassVar[str]

    def __init__(self, vision: Any, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.head = vision, head
        self.size: int = vision.config.image_size

    @classmethod
    def load_head(cls, head: str, file: PublishedFile, width: int, tower: str, dtype: torch.dtype) -> nn.Linear:
        """The head at ``head``, for embeddings of ``width`` numbers of the model ``tower`` in ``dtype``.

        Raises:
            UserError: no such file, another architecture or another width.
        """
        path = file.find(head)
        folded = fold_head(file.read(path), path, cls.layers, file)
        if width != folded.in_features:
            raise UserError(
                f"{cls.name} reward: {tower} gives embeddings of {width} numbers but the head {head} "
                f"reads {folded.in_features}; the published head belongs to {cls.backbone}"
            )
        return folded.to(exact(dtype))

    def embed(self, images: Tensor) -> Tensor:
        """Image embeddings of the tower, [B, F]."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Normalized image embeddings, [B, F]."""
        return unit(self.embed(images).to(self.head.weight.dtype))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.features(images)).squeeze(-1)


def fold_head(tensors: Mapping[str, Tensor], path: Path, layers: Sequence[str], file: PublishedFile) -> nn.Linear:
    """A published head as one layer, multiplied out in float64.

    Args:
        tensors: ``<layer>.weight`` and ``<layer>.bias`` of ``layers``, in their order.
        path, file: origin of the tensors and the published file, for messages.

    Returns:
        float64, from the embedding to one number.

    Raises:
        UserError: another architecture.
    """
    try:
        pairs = [(tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double()) for name in layers]
        shapes = [(*weight.shape, *bias.shape) for weight, bias in pairs]
        if any(len(shape) != 3 or shape[0] != shape[2] for shape in shapes):
            raise ValueError(f"weights and biases of shapes {shapes}")
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file.reward} reward: {path} is not the published head ({first_line(error)}); "
            f"expected {len(layers)} Linear layers named {layers[0]} to {layers[-1]}, as in {file.filename}"
        ) from None
    if any(before[0] != after[1] for before, after in pairwise(shapes)) or shapes[-1][0] != 1:
        raise UserError(
            f"{file.reward} reward: the layers of {path} do not chain to one score; get {file.filename} again"
        )
    matrix, offset = pairs[0]
    for weight, bias in pairs[1:]:
        matrix, offset = weight @ matrix, weight @ offset + bias
    folded = nn.Linear(matrix.shape[1], 1, dtype=torch.float64)
    folded.load_state_dict({"weight": matrix, "bias": offset})
    return folded
