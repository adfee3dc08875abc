"""The off-policy replay buffer D: states x_t of recent trajectories, bounded, and only what a step will use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sqdf_fast.kernels.philox import derive_seeds, philox_normal

Mode = Literal["uniform", "prioritised", "on-policy"]
Store = Literal["states", "x0"]


@dataclass(frozen=True)
class ReplayBatch:
    """States drawn from the buffer.

    Attributes:
        x: x_t, [B, ...], on the CPU, in the buffer's dtype.
        index: position in the schedule's timesteps, [B] int64.
        prompts: B prompts.
        trajectory: running number of each state's trajectory, [B] int64.
    """

    x: Tensor
    index: Tensor
    prompts: list[str]
    trajectory: Tensor


class ReplayBuffer:
    """A ring of trajectories, each the states at the trainable indices, or x_0 alone.

    A state is (x_t, index, prompt): x_{t-1} comes from the current policy, so it is not stored; rewards only where the
    draw is prioritised.

    With x_0 alone a state is made when it is drawn, by the forward process: x_t = signal x_0 + noise eps, eps ~ N(0, I)
    new at each draw. K times fewer bytes, and an approximation: such states are not the policy's own x_t, see
    docs/sampling.md.

    Args:
        capacity: trajectories kept; the oldest leave first.
        trainable: the schedule's mask [T] bool; only these indices are stored and drawn.
        mode: 'uniform' draws trajectory and index uniformly; 'on-policy' only from the newest refill (the last call of
            :meth:`add`); 'prioritised' draws (trajectory, index) with probability ~ max(r, 0) * gamma^remaining, and
            uniformly when no stored reward is positive.
        gamma: discount of the prioritised draw.
        store: 'states' x_t at the trainable indices, or 'x0'.
        levels: the schedule's [T, 2] float64, columns signal, noise; needed by 'x0' alone.

    Raises:
        ValueError: 'x0' without levels.
    """

    def __init__(
        self,
        capacity: int,
        trainable: Tensor,
        mode: Mode = "uniform",
        gamma: float = 1.0,
        *,
        store: Store = "states",
        levels: Tensor | None = None,
    ) -> None:
        if store == "x0" and levels is None:
            raise ValueError("a buffer of x_0 needs the schedule's levels")
        self.capacity, self.mode, self.store = capacity, mode, store
        self._levels = levels
        self.indices = torch.nonzero(trainable.cpu(), as_tuple=True)[0]
        remaining = len(trainable) - 1 - self.indices
        self._discount = gamma ** remaining.double()
        self._stored: Tensor | None = None
        self._rewards = torch.zeros(capacity, dtype=torch.float64)
        self._prompts: list[str] = [""] * capacity
        self._added = 0
        self._newest = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored of the trajectories."""
        return 0 if self._stored is None else self._stored[: len(self)].nbytes

    def add(self, stored: Tensor, prompts: Sequence[str], rewards: Tensor | None = None) -> None:
        """Store a refill of trajectories.

        Args:
            stored: x_t at the K trainable indices in increasing order, [n, K, ...], or x_0 [n, ...]; n <= capacity.
                The first call decides the buffer's dtype.
            prompts: n prompts.
            rewards: [n], of the trajectories' images; needed by 'prioritised' alone.

        Raises:
            ValueError: sizes that disagree, or rewards missing in a prioritised buffer.
        """
        if not self._fits(stored) or not len(stored) == len(prompts) <= self.capacity:
            expected = f"[n, {len(self.indices)}, ...]" if self.store == "states" else "[n, ...]"
            raise ValueError(
                f"{self.store} {tuple(stored.shape)} and {len(prompts)} prompts: expected {expected}, "
                f"n prompts and n <= {self.capacity}"
            )
        if self.mode == "prioritised" and rewards is None:
            raise ValueError("a prioritised buffer needs the trajectories' rewards")
        if self._stored is None:
            self._stored = torch.empty(self.capacity, *stored.shape[1:], dtype=stored.dtype)
        slots = (self._added + torch.arange(len(stored))) % self.capacity
        self._stored[slots] = stored.detach().to("cpu", self._stored.dtype)
        if rewards is not None:
            self._rewards[slots] = rewards.detach().double().cpu()
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            self._prompts[slot] = prompt
        self._added += len(stored)
        self._newest = len(stored)

    def draw(self, batch_size: int, generator: torch.Generator) -> ReplayBatch:
        """``batch_size`` states, drawn independently (with replacement); the generator decides all of it.

        Raises:
            ValueError: the buffer is empty.
        """
        if self._stored is None:
            raise ValueError("the replay buffer is empty; add trajectories first")
        pool = min(self._newest if self.mode == "on-policy" else self._added, self.capacity)
        numbers = self._added - pool + torch.arange(pool)
        weights = self._weights(numbers % self.capacity)
        choice = torch.multinomial(weights.flatten(), batch_size, replacement=True, generator=generator)
        number, column = numbers[choice // len(self.indices)], choice % len(self.indices)
        slots, index = number % self.capacity, self.indices[column]
        if self.store == "states":
            x = self._stored[slots, column]
        else:
            # One integer of the generator seeds the noise of the whole draw.
            seed = int(torch.randint(2**62, (), generator=generator))
            x = self._noised(self._stored[slots], index, derive_seeds(seed, ids=torch.arange(batch_size)))
        return ReplayBatch(
            x=x,
            index=index,
            prompts=[self._prompts[slot] for slot in slots.tolist()],
            trajectory=number,
        )

    def _noised(self, x0: Tensor, index: Tensor, seeds: Tensor) -> Tensor:
        """x_t = signal x_0 + noise eps at each index, computed in float32 at least: [B, ...] in the buffer's dtype."""
        assert self._levels is not None
        precision = torch.promote_types(x0.dtype, torch.float32)
        shape = (-1, *(1,) * (x0.dim() - 1))
        signal, noise = (level.view(shape) for level in self._levels[index].to("cpu", precision).unbind(1))
        epsilon = philox_normal(seeds, x0.shape[1:], dtype=precision)
        return (signal * x0.to(precision) + noise * epsilon).to(x0.dtype)

    def _fits(self, stored: Tensor) -> bool:
        return self.store == "x0" or (stored.dim() > 1 and stored.shape[1] == len(self.indices))

    def _weights(self, slots: Tensor) -> Tensor:
        uniform = torch.ones(len(slots), len(self.indices), dtype=torch.float64)
        if self.mode != "prioritised":
            return uniform
        weights = self._rewards[slots].clamp(min=0)[:, None] * self._discount
        # Rewards that are all <= 0 carry no preference: 0 / 0 would be NaN.
        return weights if weights.sum() > 0 else uniform

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs: tensors (safetensors can hold them) and JSON values."""
        n = len(self)
        return {
            "tensors": {} if self._stored is None else {self.store: self._stored[:n], "rewards": self._rewards[:n]},
            "prompts": self._prompts[:n],
            "added": self._added,
            "newest": self._newest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: it does not fit this buffer's capacity, indices or store.
        """
        n = min(state["added"], self.capacity)
        tensors = state["tensors"]
        stored = tensors.get(self.store)
        count = 0 if stored is None else len(stored)
        if not n == count == len(state["prompts"]) or (stored is not None and not self._fits(stored)):
            raise ValueError(
                f"stored buffer does not fit capacity {self.capacity}, {len(self.indices)} indices and "
                f"replay.store = {self.store}"
            )
        self._added, self._newest = state["added"], state["newest"]
        self._prompts[:n] = state["prompts"]
        if stored is not None:
            self._stored = torch.empty(self.capacity, *stored.shape[1:], dtype=stored.dtype)
            self._stored[:n] = stored
            self._rewards[:n] = tensors["rewards"]
