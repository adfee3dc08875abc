"""The LAION aesthetic score: a linear head on CLIP ViT-L/14 image embeddings."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.base import Reward
from sqdf_fast.rewards.preprocess import preprocess

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

CLIP = "openai/clip-vit-large-patch14"
HEAD = "camenduru/improved-aesthetic-predictor"
SOURCE = "github.com/christophschuhmann/improved-aesthetic-predictor"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
# Positions of the Linear layers in the published Sequential; the others are dropout, idle at inference.
_LINEAR = (0, 2, 4, 6, 7)


class AestheticReward(Reward):
    """Aesthetic score, version 2 ("sac+logos+ava1-l14-linearMSE"), about 1 to 10.

    r(x) = head(e / |e|), e = CLIP image embedding of x; the head is five Linear layers and no activation.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor. The prompt is not read.

    Args:
        clip: folder or hub id of the CLIP model in transformers' format.
        head: the published ``.pth``, the same tensors as ``.safetensors``, or the id of a hub repository.
        head_file: the file's name inside that repository.
        dtype: of the vision network; the head and the score are float32 (float64 with float64).

    Raises:
        UserError: a model that cannot be found or is of another architecture.
    """

    name = "aesthetic"

    def __init__(
        self,
        clip: str = CLIP,
        head: str = HEAD,
        head_file: str = HEAD_FILE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vision = _load_vision(clip, dtype)
        self.size: int = self.vision.config.image_size
        self.head = _load_head(head, head_file).to(torch.promote_types(dtype, torch.float32))
        width, expected = self.vision.config.projection_dim, self.head[0].in_features
        if width != expected:
            raise UserError(
                f"aesthetic reward: {clip} gives embeddings of {width} numbers but the head {head} "
                f"reads {expected}; the published head belongs to {CLIP}"
            )

    def features(self, images: Tensor) -> Tensor:
        """Normalised CLIP image embeddings, [B, 768]."""
        pixels = preprocess(images, self.size).to(self.vision.dtype)
        embeddings = self.vision(pixel_values=pixels).image_embeds.to(self.head[0].weight.dtype)
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.features(images)).squeeze(-1)


def _load_vision(clip: str, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    from safetensors import SafetensorError
    from transformers import CLIPVisionModelWithProjection

    try:
        vision, loading = CLIPVisionModelWithProjection.from_pretrained(clip, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"aesthetic reward: no CLIP model at {clip!r} ({_first_line(error)}); "
            f"give a folder or hub id as the option clip, e.g. after `hf download {CLIP}`"
        ) from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"aesthetic reward: {clip} holds no weights for {missing[0]} (of {len(missing)} missing); "
            f"a CLIP model with its vision tower is needed, e.g. {CLIP}"
        )
    return vision


def _load_head(head: str, head_file: str) -> nn.Sequential:
    path = Path(head).expanduser()
    if not path.is_file():
        path = _download(head, head_file)
    tensors = _read_tensors(path)
    try:
        layers = []
        for position in _LINEAR:
            weight, bias = tensors[f"layers.{position}.weight"], tensors[f"layers.{position}.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(
            f"aesthetic reward: {path} is not the published head ({_first_line(error)}); "
            f"expected five Linear layers named layers.0 to layers.7, as in {HEAD_FILE}"
        ) from None
    chained = all(first.out_features == second.in_features for first, second in pairwise(layers))
    if not chained or layers[-1].out_features != 1:
        raise UserError(f"aesthetic reward: the layers of {path} do not chain to one score; get {HEAD_FILE} again")
    return nn.Sequential(*layers)


def _download(repository: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except (OSError, ValueError) as error:
        raise UserError(
            f"aesthetic reward: no head at {repository!r} ({_first_line(error)}); download {HEAD_FILE} "
            f"from {SOURCE} and give its path as the option head"
        ) from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"aesthetic reward: {path} cannot be read ({_first_line(error)}); download it again from {SOURCE}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
