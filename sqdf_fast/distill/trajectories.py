"""Trajectories of the guided reference, and the look-aheads from their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone
from sqdf_fast.engine.noise import Stream
from sqdf_fast.families import Conditioning
from sqdf_fast.kernels import posterior_mean
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.schedule import DenoisingSchedule, Lookahead, consistency_rows

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trajectories:
    """Trajectories that are stochastic up to a state of their own, the branch, and deterministic after it.

    From the branch on a state determines x_0: such a pair (state, x_0) is what a consistency model learns.

    Attributes:
        states: [n, T, ...] on the CPU, state 0 the initial noise, state j what index j - 1 produced.
        x0: [n, ...] on the CPU.
        branch: [n] int64, 0 .. T - 1; 0 = deterministic from the start.
        prompts: n prompts.
    """

    states: Tensor
    x0: Tensor
    branch: Tensor
    prompts: list[str]


def lookaheads(schedule: DenoisingSchedule) -> tuple[Lookahead, Lookahead]:
    """Those of a consistency model and of Tweedie's formula at the T states of a trajectory.

    Row j >= 1 is the schedule's own for what index j - 1 produces; row 0 belongs to the initial noise, from
    which SQDF never looks ahead but one-step generation does.
    """
    consistency, tweedie = schedule.consistency(), schedule.tweedie()
    posterior, timestep = schedule.posterior[:1, None], schedule.timesteps[:1, None]
    timesteps = torch.cat([timestep, tweedie.timesteps[:-1]])
    return (
        Lookahead(torch.cat([consistency_rows(posterior, timestep), consistency.rows[:-1]]), timesteps),
        Lookahead(torch.cat([posterior, tweedie.rows[:-1]]), timesteps),
    )


@torch.no_grad()
def guided_trajectories(
    backbone: Backbone,
    schedule: DenoisingSchedule,
    prompts: Sequence[str],
    seeds: Tensor,
    branch: Tensor,
    *,
    guidance_scale: float,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> Trajectories:
    """Trajectories of the reference, with the noise that the sampler draws for the same seeds.

    Args:
        prompts: n prompts; seeds: [n] int64; branch: [n] int64, the first state that no noise follows.
        guidance_scale: 1 runs the conditional branch only.
        batch_size: trajectories denoised at once.
        on_progress: called with (network calls done, network calls in all).
    """
    states, x0 = [], []
    starts = range(0, len(prompts), batch_size)
    with backbone.role("reference"):
        for number, start in enumerate(starts):
            part = slice(start, start + batch_size)
            conditioning = backbone.family.encode(prompts[part])
            kept = []
            for i, x in enumerate(_walk(backbone, schedule, conditioning, seeds[part], branch[part], guidance_scale)):
                kept.append(x.to("cpu", backbone.family.dtype))
                if on_progress:
                    on_progress(number * len(schedule) + i, len(starts) * len(schedule))
            states.append(torch.stack(kept[:-1], dim=1))
            x0.append(kept[-1])
    return Trajectories(torch.cat(states), torch.cat(x0), branch, list(prompts))


def _walk(
    backbone: Backbone,
    schedule: DenoisingSchedule,
    conditioning: Conditioning,
    seeds: Tensor,
    branch: Tensor,
    guidance_scale: float,
) -> Iterator[Tensor]:
    family = backbone.family
    device, dtype = family.device, family.precision
    unconditional = family.encode([""]) if guidance_scale != 1 else None
    timesteps, seeds, branch = schedule.timesteps.to(device, dtype), seeds.to(device), branch.to(device)
    # Rows 0 .. T - 1 are the steps with noise, T .. 2T - 1 the same steps without.
    rows = torch.cat([schedule.transition[:, :2], schedule.ode]).to(device, dtype)

    def noise(*purpose: int) -> Tensor:
        return philox_normal(derive_seeds(*purpose, ids=seeds), family.latent_shape, dtype=dtype, device=device)

    x = noise(Stream.INITIAL)
    yield x
    for i, sigma in enumerate(schedule.transition[:, 2].tolist()):
        still = branch <= i
        m = backbone.predict(x, timesteps[i].expand(len(x)), conditioning, unconditional)
        x = posterior_mean(x, m, rows, i + len(schedule) * still, guidance_scale=guidance_scale)
        if sigma > 0 and not still.all():
            scale = sigma * (~still).to(dtype)
            x = x + scale.reshape(-1, *(1,) * (x.ndim - 1)) * noise(Stream.DENOISING, i)
        yield x
