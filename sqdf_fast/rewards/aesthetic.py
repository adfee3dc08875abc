"""The LAION aesthetic score: a linear head on CLIP ViT-L/14 image embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.clip import BLOCKS, load_vision_tower, vision_tower
from sqdf_fast.rewards.preprocess import preprocess
from sqdf_fast.rewards.published import PublishedFile, first_line

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

CLIP = "openai/clip-vit-large-patch14"
HEAD = "camenduru/improved-aesthetic-predictor"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_SOURCE = "github.com/christophschuhmann/improved-aesthetic-predictor"
# The Linear layers of the published Sequential; the others are dropout, idle at inference.
_LINEAR = tuple(f"layers.{position}" for position in (0, 2, 4, 6, 7))


class AestheticReward(Reward):
    """Aesthetic score, version 2 ("sac+logos+ava1-l14-linearMSE"), about 1 to 10.

    r(x) = w . e / |e| + b, e = CLIP image embedding of x; w and b are the published head, five Linear layers without
    activation, multiplied out. Source: github.com/christophschuhmann/improved-aesthetic-predictor. The prompt is not
    read, and CLIP's text tower is not loaded.

    Args:
        vision: image tower with projection; its dtype is that of the network's arithmetic.
        head: from its embeddings to one number, float32 or float64; the score is of that dtype.
    """

    name = "aesthetic"
    checkpointed_block_types = BLOCKS

    def __init__(self, vision: CLIPVisionModelWithProjection, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.head = vision, head
        self.size: int = vision.config.image_size

    @classmethod
    def load(
        cls,
        clip: str = CLIP,
        head: str = HEAD,
        head_file: str = HEAD_FILE,
        dtype: torch.dtype = torch.float32,
    ) -> AestheticReward:
        """The published weights.

        Args:
            clip: folder or hub id of the CLIP model in transformers' format.
            head: the published ``.pth``, the same tensors as ``.safetensors``, a folder that holds the file, or the id
                of a hub repository.
            head_file: the file's name in that folder or repository.
            dtype: of the vision network; the head and the score are float32 (float64 with float64).

        Raises:
            UserError: a model that cannot be found or is of another architecture.
        """
        vision = load_vision_tower(clip, dtype, reward=cls.name, published=CLIP)
        published = PublishedFile(cls.name, "head", "head", head_file, _SOURCE)
        path = published.find(head)
        folded = fold_head(published.read(path), path).to(torch.promote_types(dtype, torch.float32))
        width = vision.config.projection_dim
        if width != folded.in_features:
            raise UserError(
                f"aesthetic reward: {clip} gives embeddings of {width} numbers but the head {head} "
                f"reads {folded.in_features}; the published head belongs to {CLIP}"
            )
        return cls(vision, folded)

    @classmethod
    def from_config(cls, *, device: torch.device | str, dtype: torch.dtype) -> AestheticReward:
        """The same modules with random weights, from the shipped configuration."""
        vision = vision_tower("clip-vit-large-patch14", device=device, dtype=dtype)
        exact = torch.promote_types(dtype, torch.float32)
        return cls(vision, nn.Linear(vision.config.projection_dim, 1, device=device, dtype=exact))

    def features(self, images: Tensor) -> Tensor:
        """Normalized CLIP image embeddings, [B, 768]."""
        pixels = preprocess(images, self.size).to(self.vision.dtype)
        embeddings = self.vision(pixel_values=pixels).image_embeds.to(self.head.weight.dtype)
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.features(images)).squeeze(-1)


def fold_head(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    layers: Sequence[str] = _LINEAR,
    *,
    reward: str = AestheticReward.name,
    filename: str = HEAD_FILE,
) -> nn.Linear:
    """A published head, Linear layers without activation, as one layer, multiplied out in float64.

    Args:
        tensors: ``<layer>.weight`` and ``<layer>.bias`` of ``layers``, in their order; path: where they are from.
        reward, filename: which reward asks, and the name of the published file; for messages.

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
            f"{reward} reward: {path} is not the published head ({first_line(error)}); "
            f"expected {len(layers)} Linear layers named {layers[0]} to {layers[-1]}, as in {filename}"
        ) from None
    if any(before[0] != after[1] for before, after in pairwise(shapes)) or shapes[-1][0] != 1:
        raise UserError(f"{reward} reward: the layers of {path} do not chain to one score; get {filename} again")
    matrix, offset = pairs[0]
    for weight, bias in pairs[1:]:
        matrix, offset = weight @ matrix, weight @ offset + bias
    folded = nn.Linear(matrix.shape[1], 1, dtype=torch.float64)
    folded.load_state_dict({"weight": matrix, "bias": offset})
    return folded
