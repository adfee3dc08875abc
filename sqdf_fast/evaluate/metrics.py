"""One evaluation: what the judges say about a set of images."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sqdf_fast.evaluate.judge import ImageJudge, ImageSet, Measurement
from sqdf_fast.evaluate.judges import Judges
from sqdf_fast.evaluate.reward_judges import RewardJudge
from sqdf_fast.rewards import Reward

# In every record, whatever the judges; null where no judge measures it.
ALWAYS = ("true_reward", "alignment", "attribute_accuracy", "diversity", "vendi", "vendi_all", "distance_to_base")


@torch.no_grad()
def evaluate_images(
    images: Tensor,
    prompts: Sequence[str],
    reward: Reward,
    judges: Judges,
    batch_size: int = 16,
    base: Tensor | None = None,
    by_prompt: dict[str, list[float]] | None = None,
) -> dict[str, float | None]:
    """Judge sampled images. The same images give the same numbers.

    Args:
        images: float [N, 3, H, W] in [0, 1], on the reward's device.
        prompts, batch_size, base: as for :class:`ImageSet`; ``base`` by ``judges.embed``, for the distance to it.
        reward: the one that training maximizes.
        by_prompt: filled with each prompt's mean, in the order in which prompts first occur, for judges of means.

    Returns:
        eval_proxy_reward, and eval_<name> of every judge, each with ..._low and ..._high, its 95 % bootstrap interval
        over prompts; None for what no judge measures. Also eval_proxy_reward_std over images, and
        eval_alignment_shuffled, the alignment of the same images under other prompts of the set.

    Raises:
        UserError: a reward or a judge that fails; see :func:`sqdf_fast.rewards.checked_reward`.
    """
    image_set = ImageSet(images, prompts, judges.embedding, batch_size, base)
    proxy = RewardJudge("proxy_reward", reward, owns_reward=False)
    scores = image_set.scores(proxy.score)
    record: dict[str, float | None] = {"eval_proxy_reward_std": float(scores.std()) if len(scores) > 1 else 0.0}
    measured: dict[str, Measurement | None] = {proxy.name: proxy(image_set)}
    measured |= dict.fromkeys(ALWAYS)
    measured |= {name: judge(image_set) for name, judge in judges.by_name.items()}
    for name, one in measured.items():
        measurement = (None, None, None) if one is None else (one.value, one.low, one.high)
        keys = (f"eval_{name}", f"eval_{name}_low", f"eval_{name}_high")
        record |= dict(zip(keys, measurement, strict=True))
        if by_prompt is not None and one is not None and one.by_prompt is not None:
            by_prompt[name] = list(one.by_prompt.values())
    record["eval_alignment_shuffled"] = _shuffled_alignment(image_set, judges)
    return record


def _shuffled_alignment(image_set: ImageSet, judges: Judges) -> float | None:
    """Alignment with every image judged by another prompt of the set, mean of a few such exchanges."""
    judge = judges.by_name.get("alignment")
    distinct = list(image_set.rows)
    if not isinstance(judge, ImageJudge) or len(distinct) < 2:
        return None
    random.Random(0).shuffle(distinct)
    position = {prompt: index for index, prompt in enumerate(distinct)}
    means = []
    with judge.at(image_set.images.device):
        for shift in range(1, min(judge.exchanges, len(distinct) - 1) + 1):
            others = [distinct[(position[prompt] + shift) % len(distinct)] for prompt in image_set.prompts]
            means.append(float(image_set.scores(judge.score, others).mean()))
    return sum(means) / len(means)
