"""A diffusers scheduler as a small table of per-step coefficients.

Every supported sampler step is affine in the latent x and the network output m (after guidance):

    posterior mean   x0_hat = a x + b m
    transition       x_prev = p x + q m + sigma z,   z ~ N(0, I)

so that neither a kernel nor the trainer needs to know what the network predicts or which sampler runs. A
noise level is a pair (signal, noise), x = signal x_0 + noise epsilon: (sqrt(A), sqrt(1 - A)) for the
variance-preserving schedulers, A their alphas_cumprod, and (1 - s, s) for flow matching. The network output
at a level implies both parts of x:

    prediction      x0_hat                       epsilon_hat
    epsilon         (x - noise m) / signal       m
    v_prediction    signal x - noise m           noise x + signal m
    sample          m                            (x - signal m) / noise
    flow            x - s m                      x + (1 - s) m
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError

TRAINABLE_RATIO = 20.0
"""An index is trainable if its KL weight q^2 / sigma^2 is at most this many times the schedule's median.

Ordinary steps of an epsilon model stay below 7 times the median; the step that ends next to the clean
sample jumps to 30 or 120 times it (Stable Diffusion 1.5, T = 50, leading: 10.7 at index 48 against 0.18)
and would do little but hold the policy back.
"""

MODERATE_KL_WEIGHT = 4.0
"""A KL weight up to this is moderate whatever the median: flow matching's grow smoothly over four decades."""

_EXACT = ("cpu", torch.float64)

MIN_SIGMA = 2.0**-23
"""Noise below float32's resolution of a unit-scale latent changes nothing: the step is deterministic."""


@dataclass(frozen=True, eq=False)
class Lookahead:
    """n network calls, each followed by `posterior_mean` with its row: x_prev -> x0_hat.

        for j in range(lookahead.calls):
            m = network(x, lookahead.timesteps[index, j])
            x = posterior_mean(x, m, lookahead.rows[:, j], index)

    At the last index, and wherever x_prev is clean already, every row is (1, 0): x0_hat = x_prev, m is not read.

    Attributes:
        rows: [T, n, 2] float64, columns a, b; row i belongs to the x_prev that index i produces.
        timesteps: [T, n] float64, the network's timestep of each call.
    """

    rows: Tensor
    timesteps: Tensor

    @property
    def calls(self) -> int:
        """n, network calls of one look-ahead."""
        return self.rows.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Lookahead:
        """A copy on `device` for the kernels."""
        return Lookahead(self.rows.to(device, dtype), self.timesteps.to(device, dtype))


@dataclass(frozen=True, eq=False)
class DenoisingSchedule:
    """The coefficients of a sampler, computed once in float64 on the CPU. Make one with `from_scheduler`.

    Index i is the position in `timesteps`: 0 = noisiest, T - 1 = last.

    Attributes:
        prediction: "epsilon", "v_prediction", "sample" or "flow".
        num_train_timesteps: timesteps of the network's training, 1000 as a rule.
        timesteps: [T] float64, the network's timestep.
        levels: [T, 2] float64, columns signal, noise: the level of x at timesteps[i].
        transition: [T, 3] float64, columns p, q, sigma.
        posterior: [T, 2] float64, columns a, b: Tweedie's formula at timesteps[i].
        lookahead: [T, 2] float64, Tweedie's formula at the level that the step really ends at, which need
            not be that of timesteps[i + 1]; (1, 0) in the last row.
        lookahead_timesteps: [T] float64, the network's timestep at that level; 0 in the last row.
        lookahead_levels: [T, 2] float64, columns signal, noise of that level.
        trainable: [T] bool, indices whose KL weight q^2 / sigma^2 is finite and moderate. Train on no others.
        alphas_cumprod: [num_train_timesteps] float64; None for flow matching.
    """

    prediction: str
    num_train_timesteps: int
    timesteps: Tensor
    levels: Tensor
    transition: Tensor
    posterior: Tensor
    lookahead: Tensor
    lookahead_timesteps: Tensor
    lookahead_levels: Tensor
    trainable: Tensor
    alphas_cumprod: Tensor | None
    _copies: dict[tuple[str, torch.dtype], DenoisingSchedule] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._copies.setdefault(_EXACT, self)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int | None,
        eta: float = 1.0,
        *,
        trainable_ratio: float = TRAINABLE_RATIO,
        **set_timesteps: Any,
    ) -> DenoisingSchedule:
        """Read the coefficients off a diffusers scheduler, which is left as it was.

        DDIMScheduler takes eta as its own eta. DDPMScheduler has a fixed variance (fixed_small, fixed_small_log,
        fixed_large) and takes eta = 1 alone. FlowMatchEulerDiscreteScheduler runs in the SDE form of its ODE with noise
        level eta (Flow-GRPO, arXiv 2505.05470, eq. 9); at s = 1 the diffusion term uses the first level below 1.

        Args:
            scheduler: DDIMScheduler, DDPMScheduler, their parallel twins, or FlowMatchEulerDiscreteScheduler.
            num_inference_steps: T; None where `set_timesteps` gives timesteps or sigmas.
            eta: noise level, > 0.
            trainable_ratio: see TRAINABLE_RATIO.
            set_timesteps: passed on to scheduler.set_timesteps, such as mu for FLUX.

        Raises:
            UserError: another scheduler; a setting that is not affine (thresholding, clip_sample, learned variances);
                steps < 1; eta < 0; a schedule without a trainable index (eta = 0).
        """
        read = _reader(scheduler)
        _check(scheduler, num_inference_steps, eta, set_timesteps)
        scheduler = copy.deepcopy(scheduler)
        try:
            scheduler.set_timesteps(num_inference_steps, **set_timesteps)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{type(scheduler).__name__}.set_timesteps({num_inference_steps}): {reason}") from error
        steps = read(scheduler, float(eta))
        return cls._from_steps(steps, trainable_ratio, eta)

    @classmethod
    def consistency_sampling(
        cls, scheduler: Any, num_inference_steps: int, *, grid: int = 50, trainable_ratio: float = TRAINABLE_RATIO
    ) -> DenoisingSchedule:
        """Multistep sampling of a consistency model (arXiv 2303.01469, alg. 1), as diffusers' LCMScheduler steps:

            x_prev = signal' x0_hat + noise' z,     x0_hat = c_skip x + c_out (a x + b m)

        from a level to the next, and x_prev = x0_hat at the last: that step has no noise and cannot be trained. The
        network is the consistency model's, called with guidance 1.

        Args:
            scheduler: as for `from_scheduler`; it defines the prediction and the levels.
            num_inference_steps: T, 4 to 8 as a rule.
            grid: points of LCM's grid of timesteps, of which T are taken; flow matching takes the scheduler's.
            trainable_ratio: see TRAINABLE_RATIO.

        Raises:
            UserError: as `from_scheduler`; T < 2 or T > grid.
        """
        read = _reader(scheduler)
        _check(scheduler, num_inference_steps, 1.0, {})
        if not 2 <= num_inference_steps <= grid:
            raise UserError(
                f"{num_inference_steps} steps of a consistency model: 2 to {grid} are allowed (the last one adds no "
                "noise to train on), 4 to 8 are usual"
            )
        if read is _read_flow:
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(num_inference_steps)
            steps = _read_flow(scheduler, 0.0)
        else:
            steps = _read_lcm(scheduler, num_inference_steps, grid)
        posterior, _ = _split(steps.prediction, steps.levels)
        rows = consistency_rows(posterior, steps.timesteps)
        signal, noise = steps.next_levels.split(1, dim=1)
        return cls._from_steps(
            replace(steps, transition=torch.cat([signal * rows, noise], dim=1)), trainable_ratio, eta=1.0
        )

    @classmethod
    def _from_steps(cls, steps: _Steps, trainable_ratio: float, eta: float) -> DenoisingSchedule:
        posterior, _ = _split(steps.prediction, steps.levels)
        lookahead, _ = _split(steps.prediction, steps.next_levels)
        lookahead = _identity_where(lookahead, _is_last_or_clean(steps.next_levels))
        if not (torch.isfinite(posterior).all() and torch.isfinite(steps.transition).all()):
            raise UserError(
                f"prediction_type={steps.prediction!r} with eta={eta:g} gives no finite coefficients: "
                "rescale_betas_zero_snr needs v_prediction or sample, and eta is at most about 1"
            )
        trainable = _trainable(steps.transition, trainable_ratio)
        if not trainable.any():
            raise UserError(
                f"eta={eta:g} with {len(trainable)} steps leaves no index with noise to train on; "
                "take eta > 0 and a schedule whose steps add noise"
            )
        return cls(
            prediction=steps.prediction,
            num_train_timesteps=steps.num_train_timesteps,
            timesteps=steps.timesteps,
            levels=steps.levels,
            transition=steps.transition,
            posterior=posterior,
            lookahead=lookahead,
            lookahead_timesteps=steps.next_timesteps,
            lookahead_levels=steps.next_levels,
            trainable=trainable,
            alphas_cumprod=steps.alphas_cumprod,
        )

    def __len__(self) -> int:
        """T."""
        return len(self.timesteps)

    @property
    def kl_weight(self) -> Tensor:
        """[T] float64, q^2 / sigma^2: what a squared difference of network outputs costs in KL."""
        return _kl_weight(self.transition)

    @property
    def ode(self) -> Tensor:
        """[T, 2] float64, rows (p, q) of the same steps without noise: DDIM with eta = 0, or Euler."""
        return _deterministic_rows(self.prediction, self.levels, self.lookahead_levels)

    def remaining(self, index: Tensor) -> Tensor:
        """k = T - 1 - index: steps that follow the one at `index`; int64, shaped like index."""
        return len(self) - 1 - index

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> DenoisingSchedule:
        """The same schedule with its tables on `device` in `dtype`, kept for the next call.

        A copy makes its look-aheads, and further copies, from the float64 original.
        """
        key = (str(torch.device(device)), dtype)
        if key not in self._copies:
            moved: dict[str, Any] = {
                name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for name, value in vars(self._exact).items()
                if isinstance(value, Tensor)
            }
            self._copies[key] = replace(self, **moved, _copies=self._copies)
        return self._copies[key]

    @property
    def _exact(self) -> DenoisingSchedule:
        return self._copies[_EXACT]

    def tweedie(self) -> Lookahead:
        """x0_hat = E[x_0 | x_prev] by Tweedie's formula: one call of the reference."""
        exact = self._exact
        return Lookahead(exact.lookahead[:, None], exact.lookahead_timesteps[:, None])

    def consistency(self, snap: int | None = None) -> Lookahead:
        """x0_hat of a consistency model (arXiv 2310.04378): one call, x0 = c_skip x + c_out (a x + b m).

        Args:
            snap: number of grid points (50 for LCM): timestep and coefficients are those of the nearest of the grid's
                timesteps, as in the published SQDF code (961 -> 959, ..., 1 -> 19); default: x_prev's own level.

        Raises:
            UserError: snap outside 1 .. num_train_timesteps, or given for flow matching, which has no such grid.
        """
        exact = self._exact
        timesteps, posterior = exact.lookahead_timesteps, exact.lookahead
        if snap is not None:
            if exact.alphas_cumprod is None or not 1 <= snap <= exact.num_train_timesteps:
                raise UserError(
                    f"consistency grid of {snap} points: allowed are 1 to {exact.num_train_timesteps}, "
                    "and none for flow matching"
                )
            grid = exact.num_train_timesteps // snap * torch.arange(snap, 0, -1, dtype=torch.float64) - 1
            timesteps = grid[(timesteps[:, None] - grid).abs().argmin(1)]
            posterior, _ = _split(exact.prediction, _vp_levels(exact.alphas_cumprod[timesteps.long()]))
        rows = _identity_where(consistency_rows(posterior, timesteps), _is_last_or_clean(exact.lookahead_levels))
        return Lookahead(rows[:, None], timesteps[:, None])

    def deterministic(self, n: int) -> Lookahead:
        """x0_hat by n deterministic steps of the reference, from x_prev's level to 0, even in the timestep.

        n = 1 is `tweedie`. A sub-step of zero length after rounding is the row (1, 0).

        Raises:
            UserError: n < 1.
        """
        if n < 1:
            raise UserError(f"a deterministic look-ahead of {n} steps: give n >= 1")
        exact = self._exact
        fraction = torch.arange(n, -1, -1, dtype=torch.float64) / n
        timesteps = exact.lookahead_timesteps[:, None] * fraction
        if exact.alphas_cumprod is None:
            noise = exact.lookahead_levels[:, 1:] * fraction
            levels = torch.stack([1 - noise, noise], dim=-1)
        else:
            timesteps = timesteps.round()
            levels = _vp_levels(exact.alphas_cumprod[timesteps.long()])
            levels[:, -1] = torch.tensor([1.0, 0.0], dtype=torch.float64)
        rows = _deterministic_rows(exact.prediction, levels[:, :-1], levels[:, 1:])
        still = (levels[:, :-1] == levels[:, 1:]).all(-1)
        rows = _identity_where(rows, still | _is_last_or_clean(exact.lookahead_levels)[:, None])
        return Lookahead(rows, timesteps[:, :-1])


def consistency_rows(posterior: Tensor, timesteps: Tensor) -> Tensor:
    """Rows (c_skip + c_out a, c_out b) of a consistency model at a level.

    c_skip = d^2 / ((s t)^2 + d^2) and c_out = s t / sqrt((s t)^2 + d^2) with s = 10 and d = 1/2, LCM's
    timestep_scaling and sigma_data.

    Args:
        posterior: [..., 2], rows (a, b) at the level.
        timesteps: [...], t.

    Returns:
        [..., 2]; (1, 0) at t = 0.
    """
    scaled = timesteps * 10.0
    c_skip = 0.25 / (scaled**2 + 0.25)
    c_out = scaled / (scaled**2 + 0.25).sqrt()
    return torch.stack([c_skip + c_out * posterior[..., 0], c_out * posterior[..., 1]], dim=-1)


@dataclass(frozen=True)
class _Steps:
    """What a sampler does, before anything is derived from it; tensors as in DenoisingSchedule."""

    prediction: str
    num_train_timesteps: int
    timesteps: Tensor
    levels: Tensor
    next_timesteps: Tensor
    next_levels: Tensor
    transition: Tensor
    alphas_cumprod: Tensor | None


def _read_ddim(scheduler: Any, eta: float) -> _Steps:
    """DDIM, arXiv 2010.02502, eq. 12 and 16. A step is num_train_timesteps // T long in any spacing."""
    alphas, timesteps = scheduler.alphas_cumprod.double().cpu(), scheduler.timesteps
    ends = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    levels, next_levels = _vp_ends(alphas, timesteps, ends, scheduler.final_alpha_cumprod.double().cpu())
    prediction = scheduler.config.prediction_type
    variance = _posterior_variance(levels, next_levels)
    sigma = eta * variance.sqrt()
    towards = (next_levels[:, 1].square() - sigma.square()).sqrt()
    clean, noise = _split(prediction, levels)
    p, q = (next_levels[:, :1] * clean + towards[:, None] * noise).unbind(1)
    return _vp_steps(scheduler, timesteps, ends, levels, next_levels, torch.stack([p, q, sigma], 1))


def _read_ddpm(scheduler: Any, eta: float) -> _Steps:
    """DDPM, arXiv 2006.11239, eq. 7. A step ends at the next timestep."""
    alphas, timesteps = scheduler.alphas_cumprod.double().cpu(), scheduler.timesteps
    ends = torch.cat([timesteps[1:], timesteps.new_full((1,), -1)])
    levels, next_levels = _vp_ends(alphas, timesteps, ends, torch.ones((), dtype=torch.float64))
    ratio = (levels[:, 0] / next_levels[:, 0]).square()
    beta = 1 - ratio
    if scheduler.config.variance_type == "fixed_large":
        variance = beta
    else:
        variance = _posterior_variance(levels, next_levels).clamp(min=1e-20)
    sigma = torch.where(timesteps > 0, variance.sqrt(), 0.0)
    total = levels[:, 1].square()
    clean, _ = _split(scheduler.config.prediction_type, levels)
    p, q = (clean * (next_levels[:, 0] * beta / total)[:, None]).unbind(1)
    p = p + ratio.sqrt() * next_levels[:, 1].square() / total
    return _vp_steps(scheduler, timesteps, ends, levels, next_levels, torch.stack([p, q, sigma], 1))


def _read_lcm(scheduler: Any, num_inference_steps: int, grid: int) -> _Steps:
    """LCM, arXiv 2310.04378: T of the grid's timesteps, evenly spaced by number; the end is x_0. No transition."""
    alphas = scheduler.alphas_cumprod.double().cpu()
    number = grid - torch.arange(num_inference_steps) * grid // num_inference_steps
    timesteps = scheduler.config.num_train_timesteps // grid * number - 1
    levels = _vp_levels(alphas[timesteps])
    return _vp_steps(
        scheduler,
        timesteps,
        torch.cat([timesteps[1:], timesteps.new_zeros(1)]),
        levels,
        torch.cat([levels[1:], levels.new_tensor([[1.0, 0.0]])]),
        levels.new_zeros(num_inference_steps, 3),
    )


def _read_flow(scheduler: Any, eta: float) -> _Steps:
    """Flow-GRPO, arXiv 2505.05470, eq. 9, with g = eta sqrt(s / (1 - s)):

    x_prev = x + [v + g^2 / (2 s) (x + (1 - s) v)] ds + g sqrt(-ds) z
    """
    sigmas = scheduler.sigmas.double().cpu()
    s, s_next = sigmas[:-1], sigmas[1:]
    # g is infinite at s = 1: the first level below it stands in
    below = s_next[s_next < 1][0] if (s_next < 1).any() else s_next.new_zeros(())
    diffusion = eta**2 * s / (1 - torch.where(s == 1, below, s))
    ds = s_next - s
    p = 1 + diffusion / (2 * s) * ds
    q = (1 + diffusion * (1 - s) / (2 * s)) * ds
    sigma = (diffusion * -ds).sqrt()
    timesteps = scheduler.timesteps.double().cpu()
    return _Steps(
        prediction="flow",
        num_train_timesteps=scheduler.config.num_train_timesteps,
        timesteps=timesteps,
        levels=torch.stack([1 - s, s], 1),
        next_timesteps=torch.cat([timesteps[1:], timesteps.new_zeros(1)]),
        next_levels=torch.stack([1 - s_next, s_next], 1),
        transition=torch.stack([p, q, sigma], 1),
        alphas_cumprod=None,
    )


_READERS: dict[str, Callable[[Any, float], _Steps]] = {
    "DDIMScheduler": _read_ddim,
    "DDIMParallelScheduler": _read_ddim,
    "DDPMScheduler": _read_ddpm,
    "DDPMParallelScheduler": _read_ddpm,
    "FlowMatchEulerDiscreteScheduler": _read_flow,
}


def _reader(scheduler: Any) -> Callable[[Any, float], _Steps]:
    for base in type(scheduler).__mro__:
        if base.__name__ in _READERS:
            return _READERS[base.__name__]
    raise UserError(
        f"{type(scheduler).__name__} is not supported: allowed are {', '.join(_READERS)}; "
        "try DDIMScheduler.from_config(pipe.scheduler.config)"
    )


def _check(scheduler: Any, steps: int | None, eta: float, set_timesteps: dict[str, Any]) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if steps is None and not {"timesteps", "sigmas"} & set_timesteps.keys():
        raise UserError("num_inference_steps is None: give a number of steps >= 1, or timesteps or sigmas")
    if steps is not None and steps < 1:
        raise UserError(f"num_inference_steps={steps}: give at least 1 step")
    if not eta >= 0:
        raise UserError(f"eta={eta}: give a noise level > 0")
    for setting in ("thresholding", "clip_sample", "stochastic_sampling", "invert_sigmas"):
        if config.get(setting):
            raise UserError(f"{name} has {setting}=True, which changes its step: load it with {setting}=False")
    if "DDPM" in name and config.get("variance_type") not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise UserError(
            f"{name} has variance_type={config.get('variance_type')!r}: "
            "allowed are fixed_small, fixed_small_log and fixed_large"
        )
    if "DDPM" in name and eta != 1:
        raise UserError(f"{name} has no eta: eta={eta:g} was given, 1 is allowed; use DDIMScheduler for another eta")


def _vp_ends(alphas: Tensor, timesteps: Tensor, ends: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [T, 2] at timesteps and ends of the steps; an end below 0 has the scheduler's final alpha."""
    if int(timesteps.max()) >= len(alphas):
        raise UserError(
            f"timestep {int(timesteps.max())} lies beyond the {len(alphas)} training timesteps: "
            "take fewer steps or steps_offset=0"
        )
    end_alphas = torch.where(ends >= 0, alphas[ends.clamp(min=0)], final)
    return _vp_levels(alphas[timesteps]), _vp_levels(end_alphas)


def _vp_levels(alphas: Tensor) -> Tensor:
    return torch.stack([alphas.sqrt(), (1 - alphas).sqrt()], dim=-1)


def _vp_steps(
    scheduler: Any, timesteps: Tensor, ends: Tensor, levels: Tensor, next_levels: Tensor, transition: Tensor
) -> _Steps:
    next_timesteps = ends.clamp(min=0).double()
    next_timesteps[-1] = 0.0
    return _Steps(
        prediction=scheduler.config.prediction_type,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        timesteps=timesteps.double(),
        levels=levels,
        next_timesteps=next_timesteps,
        next_levels=next_levels,
        transition=transition,
        alphas_cumprod=scheduler.alphas_cumprod.double().cpu(),
    )


def _posterior_variance(levels: Tensor, next_levels: Tensor) -> Tensor:
    """Variance [T] of q(x_prev | x, x_0): (1 - A_prev) / (1 - A) (1 - A / A_prev)."""
    ratio = (levels[:, 0] / next_levels[:, 0]).square()
    return (next_levels[:, 1] / levels[:, 1]).square() * (1 - ratio)


def _split(prediction: str, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., 2] that give x0_hat and epsilon_hat from (x, m), as in the table at the top."""
    signal, noise = levels.unbind(-1)
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    if prediction == "epsilon":
        clean, rest = (1 / signal, -noise / signal), (zero, one)
    elif prediction == "v_prediction":
        clean, rest = (signal, -noise), (noise, signal)
    elif prediction == "sample":
        clean, rest = (zero, one), (1 / noise, -signal / noise)
    elif prediction == "flow":
        clean, rest = (one, -noise), (one, signal)
    else:
        raise UserError(
            f"prediction_type={prediction!r} is not supported; allowed are epsilon, v_prediction and sample"
        )
    return torch.stack(clean, dim=-1), torch.stack(rest, dim=-1)


def _deterministic_rows(prediction: str, levels: Tensor, next_levels: Tensor) -> Tensor:
    """Rows (p, q) [..., 2] of signal' x0_hat + noise' epsilon_hat."""
    clean, noise = _split(prediction, levels)
    # a clean end needs no noise estimate, which may not exist
    noise = torch.where(next_levels[..., 1:] == 0, torch.zeros_like(noise), noise)
    return next_levels[..., :1] * clean + next_levels[..., 1:] * noise


def _is_last_or_clean(next_levels: Tensor) -> Tensor:
    """[T] bool: x_prev is x_0."""
    done = next_levels[:, 1] == 0
    done[-1] = True
    return done


def _identity_where(rows: Tensor, where: Tensor) -> Tensor:
    """(1, 0) in place of the rows [..., 2] that `where` [...] names."""
    return torch.where(where[..., None], torch.tensor([1.0, 0.0], dtype=rows.dtype), rows)


def _kl_weight(transition: Tensor) -> Tensor:
    _, q, sigma = transition.unbind(1)
    return torch.where(q == 0, torch.zeros_like(q), (q / sigma).square())


def _trainable(transition: Tensor, ratio: float) -> Tensor:
    weight = _kl_weight(transition)
    noisy = transition[:, 2] > MIN_SIGMA
    if not noisy.any():
        return noisy
    return noisy & (weight <= max(ratio * float(weight[noisy].median()), MODERATE_KL_WEIGHT))
