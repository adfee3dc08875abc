from __future__ import annotations

import pytest
import torch

from sqdf_fast.replay import ReplayBuffer

TRAINABLE = torch.tensor([True, True, True, False])


def states(first: int, n: int) -> torch.Tensor:
    """Trajectory k holds k at its first index, k + 0.1 at its second, ...: a draw says where it came from."""
    number = torch.arange(first, first + n, dtype=torch.float64)[:, None] + torch.tensor(
        [0.0, 0.1, 0.2], dtype=torch.float64
    )
    return number[:, :, None].expand(-1, -1, 5).clone()


def filled(mode: str, rewards: list[float] | None = None, gamma: float = 1.0) -> ReplayBuffer:
    buffer = ReplayBuffer(4, TRAINABLE, mode, gamma=gamma)
    for first in (0, 2, 4):
        given = None if rewards is None else torch.tensor(rewards[first : first + 2])
        buffer.add(states(first, 2), [f"p{first}", f"p{first + 1}"], given)
    return buffer


def draw(buffer: ReplayBuffer, n: int, seed: int = 0):
    return buffer.draw(n, torch.Generator().manual_seed(seed))


def test_bounded_and_oldest_leave_first():
    buffer = filled("uniform")
    batch = draw(buffer, 400)
    assert len(buffer) == 4
    assert set(batch.trajectory.tolist()) == {2, 3, 4, 5}
    assert buffer.nbytes == 4 * 3 * 5 * 8


def test_a_draw_belongs_together():
    batch = draw(filled("uniform"), 64)
    steps = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    assert torch.equal(batch.x[:, 0], batch.trajectory.double() + steps[batch.index])
    assert batch.prompts == [f"p{number}" for number in batch.trajectory.tolist()]


def test_uniform_over_trainable_indices_only():
    batch = draw(filled("uniform"), 6000)
    counts = torch.bincount(batch.index, minlength=4)
    assert counts[3] == 0
    assert (counts[:3] - 2000).abs().max() < 200  # more than 5 standard deviations


def test_on_policy_draws_the_newest_refill_alone():
    assert set(draw(filled("on-policy"), 200).trajectory.tolist()) == {4, 5}


def test_prioritised_follows_reward_and_discount():
    buffer = filled("prioritised", [9, 9, 1, 0, -2, 3], gamma=0.5)
    batch = draw(buffer, 20000)
    weights = torch.tensor([1.0, 0, 0, 3])[:, None] * torch.tensor([0.125, 0.25, 0.5])
    seen = torch.zeros(4, 3)
    seen.index_put_((batch.trajectory - 2, batch.index), torch.ones(20000), accumulate=True)
    assert torch.all(seen[weights == 0] == 0)
    assert torch.allclose(seen / 20000, weights / weights.sum(), atol=0.015)


def test_prioritised_without_a_positive_reward_is_uniform():
    batch = draw(filled("prioritised", [-1.0] * 6), 6000)
    assert torch.bincount(batch.trajectory - 2).tolist() == pytest.approx([1500] * 4, abs=180)


def test_same_generator_same_draw():
    buffer = filled("uniform")
    assert torch.equal(draw(buffer, 32, seed=7).x, draw(buffer, 32, seed=7).x)
    assert not torch.equal(draw(buffer, 32, seed=7).x, draw(buffer, 32, seed=8).x)


@pytest.mark.parametrize("mode", ["uniform", "prioritised", "on-policy"])
def test_state_dict_restores_everything(mode):
    buffer = filled(mode, [9, 9, 1, 5, 2, 3], gamma=0.9)
    twin = ReplayBuffer(4, TRAINABLE, mode, gamma=0.9)
    twin.load_state_dict(buffer.state_dict())
    for buffers in (buffer, twin):
        buffers.add(states(6, 1), ["p6"], torch.tensor([4.0]))
    one, two = draw(buffer, 50), draw(twin, 50)
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.index, two.index)
    assert one.prompts == two.prompts


def test_state_of_another_schedule_is_refused():
    twin = ReplayBuffer(4, torch.tensor([True, False]), "uniform")
    with pytest.raises(ValueError, match="does not fit"):
        twin.load_state_dict(filled("uniform").state_dict())


def test_faults():
    with pytest.raises(ValueError, match="empty"):
        draw(ReplayBuffer(4, TRAINABLE), 1)
    with pytest.raises(ValueError, match="rewards"):
        ReplayBuffer(4, TRAINABLE, "prioritised").add(states(0, 1), ["p"])
    with pytest.raises(ValueError, match=r"n <= 4"):
        ReplayBuffer(4, TRAINABLE).add(states(0, 5), ["p"] * 5)
