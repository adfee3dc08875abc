"""The rewards that come with the package: where each is, what it costs and on whose terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RewardCard:
    """Facts of one reward.

    Attributes:
        address: module:attribute of its code.
        scores: what it scores, in a few words.
        parameters: in memory while training.
        download: gigabytes (10^9 bytes) of the published files, of which a part may be read; 0: nothing.
        side: of the square that its network sees, in pixels; None: the image as it is.
        reads_prompt: whether the score depends on the prompt.
        licence: of the published code and weights; "unknown" where their pages state none.
        source: where code and weights are published.
        differentiable: whether it has a gradient with respect to the images.
    """

    address: str
    scores: str
    parameters: int = 0
    download: float = 0.0
    side: int | None = None
    reads_prompt: bool = False
    licence: str = "as the package"
    source: str = "part of the package"
    differentiable: bool = True


# Sizes and licences: the file lists and model cards of the named hub repositories and the LICENSE files of the named
# code repositories. The hidden rule of the embedded world is not here: it is what training must never see.
CATALOGUE = {
    "aesthetic": RewardCard(
        "sqdf_fast.rewards.aesthetic:AestheticReward",
        "LAION aesthetic v2, 1 to 10",
        *(303_966_977, 1.71, 224, False, "head Apache-2.0; CLIP MIT (its code)"),
        "github.com/christophschuhmann/improved-aesthetic-predictor; huggingface.co/openai/clip-vit-large-patch14",
    ),
    "aesthetic-v2.5": RewardCard(
        "sqdf_fast.rewards.aesthetic_v2_5:AestheticV25Reward",
        "Aesthetic Predictor V2.5, 1 to 10",
        *(428_226_753, 3.51, 384, False, "head AGPL-3.0; SigLIP Apache-2.0"),
        "github.com/discus0434/aesthetic-predictor-v2-5; huggingface.co/google/siglip-so400m-patch14-384",
    ),
    "clip": RewardCard(
        "sqdf_fast.rewards.clip_score:CLIPScoreReward",
        "CLIPScore: 2.5 x cosine",
        *(303_966_208, 1.71, 224, True, "MIT (its code)"),
        "arXiv 2104.08718; huggingface.co/openai/clip-vit-large-patch14",
    ),
    "hpsv2": RewardCard(
        "sqdf_fast.rewards.hpsv2:HPSv2Reward",
        "Human Preference Score v2.1, v2.0",
        *(632_076_800, 1.97, 224, True, "Apache-2.0"),
        "github.com/tgxs002/HPSv2; huggingface.co/xswu/HPSv2",
    ),
    "imagereward": RewardCard(
        "sqdf_fast.rewards.imagereward:ImageReward",
        "ImageReward v1.0, human preference",
        *(445_279_489, 1.79, 224, True, "Apache-2.0; BLIP BSD-3-Clause"),
        "github.com/THUDM/ImageReward; huggingface.co/THUDM/ImageReward",
    ),
    "jpeg": RewardCard(
        "sqdf_fast.rewards.jpeg:JpegCompressibility",
        "minus the kilobytes as JPEG",
        source="arXiv 2305.13301",
        differentiable=False,
    ),
    "pickscore": RewardCard(
        "sqdf_fast.rewards.pickscore:PickScoreReward",
        "PickScore v1, human preference",
        *(632_076_800, 3.94, 224, True, "code MIT; weights unknown"),
        "github.com/yuvalkirstain/PickScore; huggingface.co/yuvalkirstain/PickScore_v1",
    ),
    "taste": RewardCard(
        "sqdf_fast.rewards.taste:TasteReward", "learned taste of the embedded world", parameters=14_569, side=64
    ),
    "taste-held-out": RewardCard(
        "sqdf_fast.rewards.taste:HeldOutTasteReward",
        "taste learned from other ratings, a judge",
        parameters=14_569,
        side=64,
    ),
    "warmth": RewardCard("sqdf_fast.shapes.rewards:warmth", "mean red minus mean blue"),
}


def as_dict() -> dict[str, dict[str, Any]]:
    """Every reward's facts by its name, for JSON."""
    return {name: asdict(card) for name, card in CATALOGUE.items()}
