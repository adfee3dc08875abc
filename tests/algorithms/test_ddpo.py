from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.direct_reward import apart, settings
from support.gradient_free import SIZE, PublishedTransitions, move, policy_gradient, step
from support.marks import slow
from support.stopping import StopWhen

from sqdf_fast.algorithms.advantages import advantages
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.runs import read_metrics
from sqdf_fast.training.lifecycle import continue_run, new_run

ALL = ["ddpo", "dpok", "awm"]


def published_loss(log_probs: torch.Tensor, old: torch.Tensor, gain: torch.Tensor, clip: float) -> torch.Tensor:
    """ddpo-pytorch: the larger of two losses, averaged over samples and time steps."""
    ratio = (log_probs - old).exp()
    return torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)).mean()


def test_the_first_update_is_the_published_gradient(model):
    found = policy_gradient(model, "ddpo")
    ours = step(found, 0)
    truth = PublishedTransitions(model, found)
    log_probs = truth.log_probs()
    assert log_probs.shape == (3, SIZE)  # the last of the four steps is not trainable
    expected = truth.gradient(published_loss(log_probs, log_probs.detach(), truth.advantages(), 1e-4))
    assert apart(ours, expected) < 1e-10


def test_later_updates_of_a_collection_are_clipped_as_published(model):
    clip = 1e-4
    found = policy_gradient(model, "ddpo", ddpo={"clip_range": clip})
    step(found, 0)
    old = PublishedTransitions(model, found).log_probs().detach()
    # Some ratios have to fall where the gradient would have them rise.
    source = torch.Generator().manual_seed(0)
    parameters = found.backbone.policy_parameters
    move(found, {name: torch.randn(value.shape, generator=source) for name, value in parameters.items()}, 0.3)
    ours = step(found, 1)
    truth = PublishedTransitions(model, found)
    log_probs, gain = truth.log_probs(), truth.advantages()
    ratio = (log_probs - old).exp()
    silenced = (gain > 0) & (ratio > 1 + clip) | (gain < 0) & (ratio < 1 - clip)
    assert 0 < silenced.sum() < silenced.numel()
    assert ((ratio - 1).abs() > clip).sum() > silenced.sum()  # outside, and yet it pulls: back towards 1
    assert apart(ours, truth.gradient(published_loss(log_probs, old, gain, clip))) < 1e-10


def test_the_ratio_of_the_first_update_is_one_whatever_sampled(model):
    """In half precision the merged network that sampled is another one: the surrogate is minus the mean advantage."""
    found = policy_gradient(model, "ddpo", dtype="bfloat16", sampling={"merge_lora": True})
    found.collect(0)
    gain = advantages(found.collection.rewards, 1, clip=5, epsilon=1e-8)
    taken = found._pairs(0, 1).trajectory
    assert float(found.accumulate(0).loss) == pytest.approx(-float(gain[taken].mean()), abs=1e-6)


def test_advantages():
    rewards = np.array([1.0, 2.0, 4.0, 10.0, 3.0, 3.0])
    whole = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    pairs = np.concatenate([(part - part.mean()) / (part.std() + 1e-8) for part in rewards.reshape(3, 2)])
    pooled = np.concatenate([part - part.mean() for part in rewards.reshape(3, 2)]) / (rewards.std() + 1e-8)
    found = torch.from_numpy(rewards)
    assert advantages(found, 1, clip=5, epsilon=1e-8).tolist() == pytest.approx(whole.tolist(), rel=1e-12)
    assert advantages(found, 2, clip=5, epsilon=1e-8).tolist() == pytest.approx(pairs.tolist(), rel=1e-12)
    assert advantages(found, 2, clip=5, epsilon=1e-8, pooled=True).tolist() == pytest.approx(pooled.tolist(), rel=1e-12)
    assert advantages(found, 1, clip=0.5, epsilon=1e-8).abs().max() == 0.5
    assert advantages(torch.full((4,), 0.1), 2, clip=5, epsilon=1e-8).tolist() == [0.0] * 4


@pytest.mark.parametrize("algorithm", ALL)
def test_a_collection_is_taken_in_turns(model, algorithm):
    """Every trajectory once before any comes twice, at different steps; the next collection is another one."""
    found = policy_gradient(model, algorithm, optimizer={"batch_size": 2}, own={"timesteps": 2, "group": 2})
    found.collect(0)
    prompts = found.collection.prompts
    assert prompts[::2] == prompts[1::2]
    first, second = (found._pairs(offset, offset + 1) for offset in (0, 1))
    taken = torch.cat([first.trajectory, second.trajectory]).reshape(4, 2)
    assert torch.equal(taken, taken[:, :1].expand(4, 2))
    assert len(taken[:, 0].unique()) == 4
    for chosen in torch.cat([first.index, second.index]).reshape(4, 2):
        assert len(chosen.unique()) == 2
    result = found.accumulate(0)
    assert torch.equal(result.reward, found.collection.rewards[taken[:2, 0]])
    assert torch.equal(result.index, first.index)
    before = found.collection
    found.collect(1)
    assert found.collection is before
    found.collect(2)
    assert not torch.equal(found.collection.stored, before.stored)


@pytest.mark.parametrize(("steps_per_refill", "forwards"), [(1, 0), (2, 3), (3, 3)])
def test_what_an_update_costs(model, steps_per_refill, forwards):
    """Old log-probabilities: none where a collection serves one step, else each distinct transition once."""
    found = policy_gradient(model, "ddpo", replay={"steps_per_refill": steps_per_refill})
    found.collect(0)
    before = found.backbone.evaluations
    found.accumulate(0)
    assert found.backbone.evaluations - before == 2 * SIZE * (3 + forwards)
    assert found.accumulate(0).kl is None
    assert found.backbone.evaluations - before == 2 * SIZE * (3 + forwards + 3)


@pytest.mark.parametrize("algorithm", ["dpok", slow("awm")])
def test_micro_batches_add_up_to_the_whole(model, algorithm):
    whole, parts = (policy_gradient(model, algorithm, own={"timesteps": 2}) for _ in range(2))
    parts.runtime.execution = whole.runtime.execution.model_copy(update={"micro_batch": 5})
    whole.runtime.execution = whole.runtime.execution.model_copy(update={"micro_batch": 100})
    one, two = step(whole, 0), step(parts, 0)
    assert apart(two, one) < 1e-12
    for found in (whole, parts):
        move(found, one, 0.01)
    assert apart(step(parts, 1), step(whole, 1)) < 1e-11


@pytest.mark.parametrize("algorithm", ["ddpo", slow("awm")])
def test_state_holds_all_that_a_second_step_needs(model, algorithm):
    whole, resumed = policy_gradient(model, algorithm), policy_gradient(model, algorithm)
    move(whole, step(whole, 0), 0.01)
    resumed.restore(*whole.state())
    for name, parameter in resumed.backbone.policy_parameters.items():
        parameter.data.copy_(whole.backbone.policy_parameters[name])
    one, two = step(whole, 1), step(resumed, 1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match=r"6 samples where replay\.refill = 8"):
        policy_gradient(model, algorithm, replay={"refill": 8}).restore(*whole.state())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ddpo": {"group": 4}}, r"replay\.refill = 6 with ddpo\.group = 4"),
        ({"replay": {"refill": 1}}, "at least 2"),
        ({"ddpo": {"timesteps": 5}}, r"ddpo\.timesteps = 5 and this schedule has 3 trainable"),
    ],
)
def test_what_cannot_be_is_refused(model, changes, said):
    with pytest.raises(UserError, match=said) as error:
        policy_gradient(model, "ddpo", **changes)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na ring\n")
    return tmp_path


def run_config(model: Path, algorithm: str, **changes):
    ours = {
        "prompts": "prompts.txt",
        "reward": "jpeg",
        "steps": 3,
        "dtype": "float64",
        "sampling": {"guidance_scale": 1.0},
        "optimizer": {"batch_size": 4, "lr": 1e-2},
        "replay": {"refill": 4, "steps_per_refill": 2},
        "execution": {"micro_batch": 8},
        "evaluation": {"every": 1, "num_prompts": 1, "images_per_prompt": 2},
        "own": {"timesteps": 2},
    }
    return settings(model, algorithm, **{**ours, **changes})


def lora(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpo", slow("awm")])
def test_a_reward_without_a_gradient_trains_and_a_resumed_run_is_the_same(model, folder, algorithm):
    new_run(run_config(model, algorithm), folder / "whole")
    metrics = folder / "parts" / "metrics.jsonl"
    # In the evaluation between the two steps of a collection.
    with pytest.raises(Interrupted):
        new_run(
            run_config(model, algorithm),
            folder / "parts",
            StopWhen(lambda: metrics.exists() and '"kind": "step"' in metrics.read_text(encoding="utf-8")),
        )
    assert [line["step"] for line in read_metrics(metrics) if line["kind"] == "step"] == [1]
    continue_run(folder / "parts")
    one, two = lora(folder / "whole"), lora(folder / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_running_out_of_memory_changes_no_result(model, folder, monkeypatch):
    config = run_config(model, "dpok", steps=2)
    new_run(config, folder / "plain")
    begin, seen = Runtime.begin, []

    def failing(self, stage, *needed):
        begin(self, stage, *needed)
        seen.append(stage)
        if seen.count("backward") == 1 and stage == "backward":
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Runtime, "begin", failing)
    new_run(config, folder / "squeezed")
    assert len(seen) > 6
    one, two = lora(folder / "plain"), lora(folder / "squeezed")
    assert apart(two, one) < 1e-9
    steps = [line for line in read_metrics(folder / "squeezed" / "metrics.jsonl") if line["kind"] == "step"]
    assert "micro_batch 8 -> 4" in steps[0]["budget_event"]
