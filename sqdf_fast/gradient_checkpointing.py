"""Gradient checkpointing of chosen blocks: the backward pass runs them again instead of keeping their activations.

The libraries' own switches act on whole stages of a network, some only in training mode; this one wraps any block by
the name of its class, down to single residual blocks, and counts the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Context = Callable[[], AbstractContextManager[None]]


class CheckpointedBlocks:
    """The wrapped blocks of one module.

    Attributes:
        blocks: number of wrapped blocks; enabled: whether they checkpoint.
        count: blocks run again so far.
    """

    def __init__(self, reenter: Callable[[], Context] | None = None) -> None:
        self.blocks, self.count, self.enabled = 0, 0, True
        self._reenter = reenter

    def wrap(self, block: nn.Module) -> None:
        """Checkpoint ``block`` from now on."""
        block.forward = partial(self._run, block.forward)
        self.blocks += 1

    def _run(self, forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        if not (self.enabled and torch.is_grad_enabled()):
            return forward(*inputs, **keywords)
        context = self._reenter() if self._reenter else nullcontext
        calls = 0

        def run(*inputs: Any, **keywords: Any) -> Any:
            nonlocal calls
            self.count += calls
            calls = 1
            with context():
                return forward(*inputs, **keywords)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **keywords)


def checkpoint_blocks(
    module: nn.Module, kinds: Collection[str], reenter: Callable[[], Context] | None = None
) -> CheckpointedBlocks:
    """Checkpoint every submodule whose class name is in ``kinds``; gradients stay the same.

    A block inside a chosen block is chosen too. Without a graph, nothing changes. No random numbers may be drawn
    inside (frozen networks have no dropout).

    Args:
        module: searched, itself included.
        reenter: called when a block runs; returns the context in which it has to run again (the network's role).
    """
    blocks = CheckpointedBlocks(reenter)
    for block in module.modules():
        if type(block).__name__ in kinds:
            blocks.wrap(block)
    return blocks
