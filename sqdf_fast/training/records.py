"""The record of a step in metrics.jsonl, and the progress line of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqdf_fast.engine import StepResult


def step_record(step: int, result: StepResult) -> dict[str, Any]:
    """Reward, loss and KL of optimizer step ``step``, the KL also by position in the schedule."""
    reward, kl, index = result.reward.double(), result.kl, result.index
    record: dict[str, Any] = {
        "kind": "step",
        "step": step,
        "reward_mean": reward.mean().item(),
        "reward_std": reward.std(correction=0).item(),
        "loss": float(result.loss),
    }
    if kl is not None:
        kl = kl.double().cpu()
        record["kl_mean"] = kl.mean().item()
        record["kl_by_index"] = {str(i): kl[index == i].mean().item() for i in index.unique().tolist()}
    return record


def evaluation_line(record: Mapping[str, Any]) -> str:
    """The main scores of an evaluation's record, for a terminal."""
    names = ("proxy_reward", "true_reward", "attribute_accuracy", "diversity", "alignment")
    scores = [(name, record.get(f"eval_{name}")) for name in names]
    shown = [f"{name.replace('_', ' ')} {score:.3f}" for name, score in scores if score is not None]
    return f"evaluation at step {record['step']}: " + ", ".join(shown)
