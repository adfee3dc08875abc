"""The off-policy replay buffer D: states x_t of recent trajectories, bounded, and only what a step will use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["uniform", "prioritised", "on-policy"]


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
    """A ring of trajectories, each the states at the trainable indices.

    A state is (x_t, index, prompt): x_{t-1} comes from the current policy, so neither it nor x_0 is stored; rewards
    only where the draw is prioritised.

    Args:
        capacity: trajectories kept; the oldest leave first.
        trainable: the schedule's mask [T] bool; only these indices are stored and drawn.
        mode: 'uniform' draws trajectory and index uniformly; 'on-policy' only from the newest refill (the last call of
            :meth:`add`); 'prioritised' draws (trajectory, index) with probability ~ max(r, 0) * gamma^remaining, and
            uniformly when no stored reward is positive.
        gamma: discount of the prioritised draw.
    """

    def __init__(self, capacity: int, trainable: Tensor, mode: Mode = "uniform", gamma: float = 1.0) -> None:
        self.capacity, self.mode = capacity, mode
        self.indices = torch.nonzero(trainable.cpu(), as_tuple=True)[0]
        remaining = len(trainable) - 1 - self.indices
        self._discount = gamma ** remaining.double()
        self._states: Tensor | None = None
        self._rewards = torch.zeros(capacity, dtype=torch.float64)
        self._prompts: list[str] = [""] * capacity
        self._added = 0
        self._newest = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored states."""
        return 0 if self._states is None else self._states[: len(self)].nbytes

    def add(self, states: Tensor, prompts: Sequence[str], rewards: Tensor | None = None) -> None:
        """Store a refill of trajectories.

        Args:
            states: [n, K, ...], x_t at the K trainable indices in increasing order; n <= capacity.
            prompts: n prompts.
            rewards: [n], of the trajectories' images; needed by 'prioritised' alone.

        Raises:
            ValueError: sizes that disagree, or rewards missing in a prioritised buffer.
        """
        if states.shape[1] != len(self.indices) or not len(states) == len(prompts) <= self.capacity:
            raise ValueError(
                f"states {tuple(states.shape)} and {len(prompts)} prompts: expected [n, {len(self.indices)}, ...], "
                f"n prompts and n <= {self.capacity}"
            )
        if self.mode == "prioritised" and rewards is None:
            raise ValueError("a prioritised buffer needs the trajectories' rewards")
        if self._states is None:
            self._states = torch.empty(self.capacity, *states.shape[1:], dtype=states.dtype)
        slots = (self._added + torch.arange(len(states))) % self.capacity
        self._states[slots] = states.detach().cpu()
        if rewards is not None:
            self._rewards[slots] = rewards.detach().double().cpu()
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            self._prompts[slot] = prompt
        self._added += len(states)
        self._newest = len(states)

    def draw(self, batch_size: int, generator: torch.Generator) -> ReplayBatch:
        """``batch_size`` states, drawn independently (with replacement).

        Raises:
            ValueError: the buffer is empty.
        """
        if self._states is None:
            raise ValueError("the replay buffer is empty; add trajectories first")
        pool = min(self._newest if self.mode == "on-policy" else self._added, self.capacity)
        numbers = self._added - pool + torch.arange(pool)
        weights = self._weights(numbers % self.capacity)
        choice = torch.multinomial(weights.flatten(), batch_size, replacement=True, generator=generator)
        number, column = numbers[choice // len(self.indices)], choice % len(self.indices)
        slots = number % self.capacity
        return ReplayBatch(
            x=self._states[slots, column],
            index=self.indices[column],
            prompts=[self._prompts[slot] for slot in slots.tolist()],
            trajectory=number,
        )

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
            "tensors": {} if self._states is None else {"states": self._states[:n], "rewards": self._rewards[:n]},
            "prompts": self._prompts[:n],
            "added": self._added,
            "newest": self._newest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. Raises ValueError when it does not fit this buffer's capacity or indices."""
        n = min(state["added"], self.capacity)
        tensors = state["tensors"]
        if n != len(state["prompts"]) or (n > 0 and tensors["states"].shape[:2] != (n, len(self.indices))):
            raise ValueError(f"stored buffer does not fit capacity {self.capacity} and {len(self.indices)} indices")
        self._added, self._newest = state["added"], state["newest"]
        self._prompts[:n] = state["prompts"]
        if n > 0:
            self._states = torch.empty(self.capacity, *tensors["states"].shape[1:], dtype=tensors["states"].dtype)
            self._states[:n] = tensors["states"]
            self._rewards[:n] = tensors["rewards"]
