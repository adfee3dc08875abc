"""One evaluation: what the judges say about a set of pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sqdf_fast.evaluate.bootstrap import bootstrap_interval
from sqdf_fast.evaluate.judges import Judges
from sqdf_fast.rewards import Reward, checked_reward

SHUFFLES = 8


@torch.no_grad()
def evaluate_images(
    images: Tensor,
    prompts: Sequence[str],
    reward: Reward,
    judges: Judges,
    batch_size: int = 16,
) -> dict[str, float | None]:
    """Judge sampled pictures. The same pictures give the same numbers.

    Args:
        images: float [N, 3, H, W] in [0, 1], on the reward's device.
        prompts: N prompts; diversity needs prompts that occur more than once.
        reward: the one that training maximises.
        batch_size: pictures judged at once.

    Returns:
        eval_proxy_reward and its standard deviation over pictures, eval_proxy_reward_std; eval_true_reward;
        eval_alignment, and eval_alignment_shuffled for the same pictures under other prompts of the set;
        eval_attribute_accuracy; eval_diversity. The two rewards also as ..._low and ..._high, the 95 %
        bootstrap interval of the mean over prompts. None for what the judges cannot tell.

    Raises:
        UserError: a reward that fails; see :func:`sqdf_fast.rewards.checked_reward`.
    """
    batches = list(_batches(images, prompts, batch_size))
    proxy = torch.cat([checked_reward(reward, *batch).double().cpu() for batch in batches])
    true = _scores(judges.true_reward, batches)
    found: dict[str, float | None] = {"eval_proxy_reward_std": float(proxy.std()) if len(proxy) > 1 else 0.0}
    for name, scores in (("eval_proxy_reward", proxy), ("eval_true_reward", true)):
        low, high = (None, None) if scores is None else bootstrap_interval(scores.tolist(), prompts)
        found |= {name: _mean(scores), f"{name}_low": low, f"{name}_high": high}
    found["eval_alignment"] = _mean(_scores(judges.alignment, batches))
    found["eval_alignment_shuffled"] = _shuffled_alignment(images, prompts, judges, batch_size)
    found["eval_attribute_accuracy"] = judges.attribute_accuracy(images, prompts)
    found["eval_diversity"] = judges.diversity(images, prompts)
    return found


def _batches(images: Tensor, prompts: Sequence[str], size: int) -> Iterator[tuple[Tensor, Sequence[str]]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], prompts[start : start + size]


def _scores(
    judge: Callable[[Tensor, Sequence[str]], Tensor | None], batches: Sequence[tuple[Tensor, Sequence[str]]]
) -> Tensor | None:
    scores = [judge(*batch) for batch in batches]
    known = [part.double().cpu() for part in scores if part is not None]
    return torch.cat(known) if len(known) == len(batches) else None


def _mean(scores: Tensor | None) -> float | None:
    return None if scores is None else float(scores.mean())


def _shuffled_alignment(images: Tensor, prompts: Sequence[str], judges: Judges, size: int) -> float | None:
    """Alignment with every picture judged by another prompt of the set, mean of up to 8 such exchanges."""
    distinct = list(dict.fromkeys(prompts))
    random.Random(0).shuffle(distinct)
    position = {prompt: index for index, prompt in enumerate(distinct)}
    means = []
    for shift in range(1, min(SHUFFLES, len(distinct) - 1) + 1):
        others = [distinct[(position[prompt] + shift) % len(distinct)] for prompt in prompts]
        mean = _mean(_scores(judges.alignment, list(_batches(images, others, size))))
        if mean is None:
            return None
        means.append(mean)
    return sum(means) / len(means) if means else None
