from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sqdf_fast.gradient_checkpointing import checkpoint_blocks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.layers(x)


class Tower(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def gradient(tower: Tower) -> torch.Tensor:
    x = torch.ones(2, 8, requires_grad=True)
    return torch.autograd.grad(tower(x).square().sum(), x)[0]


def saved_bytes(tower: Tower) -> int:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        tower(torch.ones(2, 8, requires_grad=True))
    return sum(kept)


def test_the_gradient_is_the_same_and_every_block_ran_twice():
    plain, wrapped = Tower(), Tower()
    found = checkpoint_blocks(wrapped, {"Block"})
    assert found.blocks == 3
    assert torch.equal(gradient(plain), gradient(wrapped))
    assert found.count == 3
    gradient(wrapped)
    assert found.count == 6


def test_it_keeps_less():
    plain, wrapped = Tower(), Tower()
    checkpoint_blocks(wrapped, {"Block"})
    # Under the checkpoint's own hooks nothing of a block's inside reaches ours.
    assert saved_bytes(wrapped) < saved_bytes(plain) / 4


@pytest.mark.parametrize("off", ["no graph", "disabled"])
def test_without_need_nothing_is_checkpointed(off):
    tower = Tower()
    found = checkpoint_blocks(tower, {"Block"})
    if off == "disabled":
        found.enabled = False
        gradient(tower)
    else:
        with torch.no_grad():
            tower(torch.ones(2, 8))
    assert found.count == 0


def test_a_block_runs_again_in_the_context_of_its_first_run():
    tower, state, seen = Tower(depth=1), ["first"], []

    @contextmanager
    def inside(name):
        before, state[0] = state[0], name
        try:
            yield
        finally:
            state[0] = before

    tower.blocks[0].register_forward_pre_hook(lambda *_: None)
    tower.blocks[0].layers[0].register_forward_pre_hook(lambda *_: seen.append(state[0]))
    checkpoint_blocks(tower, {"Block"}, reenter=lambda: lambda name=state[0]: inside(name))
    out = tower(torch.ones(2, 8, requires_grad=True)).sum()
    state[0] = "second"
    out.backward()
    assert seen == ["first", "first"]
    assert state == ["second"]


def test_nested_blocks_may_both_be_chosen():
    plain, wrapped = Tower(), Tower()
    found = checkpoint_blocks(wrapped, {"Tower", "Block"})
    assert found.blocks == 4
    assert torch.equal(gradient(plain), gradient(wrapped))
    assert found.count >= 4
