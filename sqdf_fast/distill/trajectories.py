"""Trajectories of the guided reference, and the look-aheads from their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.sampler import Sampler, Step
from sqdf_fast.kernels import posterior_mean
from sqdf_fast.kernels.guidance import per_sample
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
    sampler = Sampler(backbone, schedule, guidance_scale=guidance_scale, batch_size=batch_size, merge_lora=False)
    states, x0 = [], []
    starts = range(0, len(prompts), batch_size)
    with backbone.role("reference"):
        for number, start in enumerate(starts):
            part, kept = slice(start, start + batch_size), []
            transition = _branching(sampler, branch[part])
            for i, x in enumerate(sampler.walk(prompts[part], seeds[part], transition=transition)):
                kept.append(x.to("cpu", backbone.family.dtype))
                if on_progress:
                    on_progress(number * len(schedule) + i, len(starts) * len(schedule))
            states.append(torch.stack(kept[:-1], dim=1))
            x0.append(kept[-1])
    return Trajectories(torch.cat(states), torch.cat(x0), branch, list(prompts))


def _branching(sampler: Sampler, branch: Tensor) -> Callable[[Step], Tensor]:
    """Transitions with the sampler's noise before each sample's branch, [B], and deterministic ones after it."""
    family, schedule = sampler.backbone.family, sampler.schedule
    branch, sigmas = branch.to(family.device), schedule.transition[:, 2].tolist()
    # Rows 0 .. T - 1 are the steps with noise, T .. 2T - 1 the same steps without.
    table = torch.cat([schedule.transition[:, :2], schedule.ode]).to(family.device, family.precision)

    def transition(step: Step) -> Tensor:
        timesteps = sampler.tables.timesteps[step.index]
        m = sampler.backbone.predict(step.x, timesteps, step.conditioning, step.unconditional)
        still, sigma = branch <= step.i, sigmas[step.i]
        rows = step.i + len(sigmas) * still
        x = posterior_mean(step.x, m, table, rows, guidance_scale=sampler.guidance_scale)
        if sigma == 0 or still.all():
            return x
        seeds = derive_seeds(Stream.DENOISING, step.i, ids=step.seeds).to(family.device)
        noise = philox_normal(seeds, family.latent_shape, dtype=x.dtype, device=family.device)
        return x + per_sample(sigma * (~still).to(x.dtype), x) * noise

    return transition
