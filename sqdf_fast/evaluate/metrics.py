"""One evaluation: what the judges say about a set of pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sqdf_fast.evaluate.judge import Measurement, PictureJudge, Pictures
from sqdf_fast.evaluate.judges import Judges
from sqdf_fast.evaluate.reward_judges import RewardJudge
from sqdf_fast.rewards import Reward

# In every record, whatever the judges; null where none of them can tell.
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
        prompts: N prompts; diversity needs prompts that occur more than once.
        reward: the one that training maximises.
        batch_size: pictures judged at once.
        base: ``judges.embed`` of the base model's pictures of the same prompts and seeds, in the same order, for the
            distance to it.
        by_prompt: filled with the means of each prompt, in the order in which prompts first occur, by judge; of
            those judges whose number is a mean.

    Returns:
        eval_proxy_reward, and eval_<name> of every judge, each with ..._low and ..._high, its 95 % bootstrap interval
        over prompts; None for what cannot be told. Also eval_proxy_reward_std over pictures, and
        eval_alignment_shuffled, the alignment of the same pictures under other prompts of the set.

    Raises:
        UserError: a reward or a judge that fails; see :func:`sqdf_fast.rewards.checked_reward`.
    """
    pictures = Pictures(images, prompts, judges.embedding, batch_size, base)
    proxy = RewardJudge("proxy_reward", reward, visits=False)
    scores = pictures.scores(proxy.score)
    found: dict[str, float | None] = {"eval_proxy_reward_std": float(scores.std()) if len(scores) > 1 else 0.0}
    measured: dict[str, Measurement | None] = {proxy.name: proxy(pictures)}
    measured |= dict.fromkeys(ALWAYS)
    measured |= {name: judge(pictures) for name, judge in judges.by_name.items()}
    for name, one in measured.items():
        found |= _keys(name, one)
        if by_prompt is not None and one is not None and one.by_prompt is not None:
            by_prompt[name] = list(one.by_prompt.values())
    found["eval_alignment_shuffled"] = _shuffled_alignment(pictures, judges)
    return found


def _keys(name: str, measured: Measurement | None) -> dict[str, float | None]:
    found = (None, None, None) if measured is None else (measured.value, measured.low, measured.high)
    return dict(zip((f"eval_{name}", f"eval_{name}_low", f"eval_{name}_high"), found, strict=True))


def _shuffled_alignment(pictures: Pictures, judges: Judges) -> float | None:
    """Alignment with every picture judged by another prompt of the set, mean of a few such exchanges."""
    judge = judges.by_name.get("alignment")
    distinct = list(pictures.rows)
    if not isinstance(judge, PictureJudge) or len(distinct) < 2:
        return None
    random.Random(0).shuffle(distinct)
    position = {prompt: index for index, prompt in enumerate(distinct)}
    means = []
    with judge.at(pictures.images.device):
        for shift in range(1, min(judge.exchanges, len(distinct) - 1) + 1):
            others = [distinct[(position[prompt] + shift) % len(distinct)] for prompt in pictures.prompts]
            means.append(float(pictures.scores(judge.score, others).mean()))
    return sum(means) / len(means)
