"""How well one network call foresees what the guided model makes of a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.display import text_table
from sqdf_fast.distill.trajectories import OnProgress, guided_trajectories, lookaheads
from sqdf_fast.engine import RewardFunction
from sqdf_fast.objective import look_ahead
from sqdf_fast.schedule import DenoisingSchedule, Lookahead


@dataclass(frozen=True)
class Accuracy:
    """One kind of look-ahead at one noise level, over n states of the guided model's stochastic trajectories.

    x_0 is what the guided model makes of such a state without further noise.

    Attributes:
        lookahead: "consistency" or "tweedie"; timestep: the network's.
        error: squared error of x0_hat over the mean square of x_0, in latents.
        sharpness: mean absolute difference of neighboring pixels in x0_hat's image, over that in x_0's.
        correlation: Pearson's, of the rewards of the two images; None without a reward.
    """

    lookahead: str
    timestep: float
    error: float
    sharpness: float
    correlation: float | None


@torch.no_grad()
def measure_accuracy(
    backbone: Backbone,
    schedule: DenoisingSchedule,
    prompts: Sequence[str],
    seeds: Tensor,
    states: Sequence[int],
    *,
    role: Role,
    guidance_scale: float,
    batch_size: int,
    reward: RewardFunction | None = None,
    on_progress: OnProgress | None = None,
) -> list[Accuracy]:
    """The consistency function of ``role`` and Tweedie's formula of the guided reference, at the same states.

    Args:
        prompts: n prompts; seeds: [n] int64.
        states: which of a trajectory's T states to measure at; 0 = the initial noise.
        role: whose consistency function: "policy" while that is distilled, "consistency" once it is loaded.
        guidance_scale: of the reference; batch_size: samples a network call takes.
        reward: images [B, 3, H, W] in [0, 1] and prompts to [B].
        on_progress: called with (network calls done, network calls in all), of the trajectories.
    """
    consistency, tweedie = lookaheads(schedule)
    kinds: list[tuple[str, Role, Lookahead, float]] = [
        ("consistency", role, consistency, 1.0),
        ("tweedie", "reference", tweedie, guidance_scale),
    ]
    table = []
    for number, state in enumerate(states):

        def report(done: int, total: int, before: int = number) -> None:
            if on_progress:
                on_progress(before * total + done, len(states) * total)

        reached = guided_trajectories(
            backbone,
            schedule,
            prompts,
            seeds,
            torch.full((len(prompts),), state),
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            on_progress=report,
        )
        x0 = reached.x0.double()
        sharpness, rewards = _sharpness_and_rewards(backbone, reached.x0, prompts, batch_size, reward)
        for name, who, lookahead, scale in kinds:
            x0_hat = _foresee(backbone, who, reached.states[:, state], state, prompts, lookahead, scale, batch_size)
            own_sharpness, own_rewards = _sharpness_and_rewards(backbone, x0_hat, prompts, batch_size, reward)
            both = torch.stack([own_rewards, rewards])
            table.append(
                Accuracy(
                    name,
                    timestep=float(lookahead.timesteps[state, 0]),
                    error=float((x0_hat.double() - x0).square().mean() / x0.square().mean()),
                    sharpness=own_sharpness / sharpness,
                    correlation=None if reward is None else float(torch.corrcoef(both)[0, 1]),
                )
            )
    return table


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a summary's ``accuracy``, fields of :class:`Accuracy`, as text for a terminal."""
    heads = ("look-ahead", "timestep", "error", "sharpness", "reward correlation")
    return text_table(heads, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    correlation = "-" if row["correlation"] is None else f"{row['correlation']:.3f}"
    return [row["lookahead"], f"{row['timestep']:.0f}", f"{row['error']:.3f}", f"{row['sharpness']:.3f}", correlation]


def _foresee(
    backbone: Backbone,
    role: Role,
    x: Tensor,
    state: int,
    prompts: Sequence[str],
    lookahead: Lookahead,
    guidance_scale: float,
    batch_size: int,
) -> Tensor:
    family = backbone.family
    lookahead = lookahead.to(family.device, family.precision)
    unconditional = family.unconditional(guidance_scale)
    estimates = []
    with backbone.role(role):
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            states = x[part].to(family.device, family.precision)
            index = torch.full((len(states),), state, device=family.device)
            conditioning = family.encode(prompts[part])
            network = partial(backbone.predict, conditioning=conditioning, unconditional=unconditional)
            estimates.append(look_ahead(states, index, lookahead, network, guidance_scale=guidance_scale).cpu())
    return torch.cat(estimates)


def _sharpness_and_rewards(
    backbone: Backbone, latents: Tensor, prompts: Sequence[str], batch_size: int, reward: RewardFunction | None
) -> tuple[float, Tensor]:
    """Mean difference of neighboring pixels in the decoded images, and the images' rewards, [n], empty without one."""
    family = backbone.family
    detail, rewards = [], [torch.empty(0, dtype=torch.float64)]
    for start in range(0, len(latents), batch_size):
        part = slice(start, start + batch_size)
        images = family.decode(latents[part].to(family.device, family.dtype)).float()
        detail += [images.diff(dim=axis).abs().mean(dim=(1, 2, 3)).double().cpu() for axis in (2, 3)]
        if reward is not None:
            rewards.append(reward(images, prompts[part]).double().cpu())
    return float(torch.cat(detail).mean()), torch.cat(rewards)
