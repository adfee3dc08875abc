"""The published way is a fair baseline, and what is measured of a step is what happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases.training_step import measure, prediction, setups
from cases.training_step.benchmark import BENCHMARK, group, verdicts
from cases.training_step.problem import OURS, PUBLISHED, Problem, problem
from cases.training_step.published import NO_QUIRKS, Published, Quirks
from cases.training_step.setups import Ours, Step
from harness.benchmark import measure as measure_group
from support.tiny import write_pipeline

from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine import make_executor
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.replay import ReplayBatch

STEPS, GUIDANCE = 50, 5.0
INDEX = [0, 49, 17, 48, 47, 30]
PROMPTS = ["a red star", "a blue ring", "a ring", "a star", "a red ring", "a blue star"]
TINY = Problem("tiny", "taste", torch.float64, "cpu", 6, 2, 2, 4, STEPS, GUIDANCE)


class Contrast(torch.nn.Module):
    """A differentiable score of both signs that does not saturate."""

    def forward(self, images, prompts):
        direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=images.dtype)
        return 50 * (direction * (3 * images - 1.3).sin()).flatten(1).mean(1) + 0.1 * (lengths - 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def ours(model, monkeypatch) -> Ours:
    """The tiny model in float64, its LoRAs random, 6 samples of which one is at the last index."""
    monkeypatch.setattr(
        setups, "_family", lambda problem: load_family(str(model), device=torch.device("cpu"), dtype=torch.float64)
    )
    monkeypatch.setattr(setups, "_reward", lambda problem: Contrast())
    monkeypatch.setattr(setups, "_PROMPTS", tuple(PROMPTS))
    monkeypatch.setattr(setups, "_LORA_NOISE", 0.1)
    found = Ours(TINY)
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found.batch = ReplayBatch(x, torch.tensor(INDEX), PROMPTS, torch.arange(6))
    return found


def relative(found, truth) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("way", OURS)
def test_the_published_way_has_our_gradient(ours, way):
    published = ours.published().gradient()
    assert published.norm() > 1e-2
    assert relative(ours.step(way).gradient(), published) < 1e-10


@pytest.mark.slow
@pytest.mark.usefixtures("ours")
def test_what_is_recorded_of_every_way(monkeypatch):
    """The whole measurement, on a model so small that the figures say nothing of speed."""
    small = replace(TINY, batch=2, toy=True)
    monkeypatch.setattr(measure, "parity_problem", lambda given: given)
    monkeypatch.setattr(prediction, "stage_bytes", lambda given, name: {"transition": 10, "reward": 20})
    found = measure_group(BENCHMARK, group(small), toy=True)
    rows = found.rows
    assert list(rows) == [PUBLISHED, *OURS]
    for name, row in rows.items():
        assert row["fault"] is None
        assert row["gradient_error"] < 1e-10
        assert len(found.samples[name]) == 2
        assert row["times_published"] == rows[PUBLISHED]["median_seconds"] / row["median_seconds"]
        assert row["flops_per_second"] == row["flops"] / row["median_seconds"]
        assert row["utilisation"] == row["flops_per_second"] / row["best_flops_per_second"]
        assert row["peak_bytes"] == max(row["stage_bytes"].values()) > row["resident_bytes"]
        assert row["flops_of_published"] == row["flops"] / rows[PUBLISHED]["flops"]
    assert rows["joint"]["flops"] < rows[PUBLISHED]["flops"]
    assert rows["staged"]["flops"] < rows["staged + checkpointing"]["flops"]
    assert rows["staged"]["predicted_bytes"] == 20
    assert rows[PUBLISHED]["predicted_bytes"] is None
    stages = ["transition", "look-ahead", "reward", "look-ahead vjp", "policy vjp"]
    assert list(rows["staged + checkpointing + offload"]["stage_bytes"]) == stages


@pytest.mark.slow
def test_with_its_quirks_it_is_what_our_options_for_them_give(ours):
    executor = make_executor(
        ours.backbone,
        ours.schedule,
        ours.reward,
        Objective(alpha=2.0, gamma=0.9, lookahead="consistency", consistency_grid=50, mask_nonpositive=True),
        guidance_scale=GUIDANCE,
        execution=Execution(executor="joint", micro_batch=6),
    )
    result = executor.accumulate(ours.batch, ours.seeds)
    expected = torch.cat([parameter.grad.flatten() for parameter in ours.backbone.policy_parameters.values()])
    published = published_with(ours, replace(NO_QUIRKS, masked=True, grid=50))
    found, gradient = accumulated(ours, published)
    assert 0 < (result.reward <= 0).sum() < 6
    torch.testing.assert_close(found.reward, result.reward, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.kl, result.kl, rtol=1e-10, atol=0)
    assert float(found.loss) == pytest.approx(float(result.loss), rel=1e-10)
    assert relative(gradient, expected) < 1e-10


@pytest.mark.slow
def test_every_quirk_changes_the_numbers(ours):
    _, plain = accumulated(ours, published_with(ours, NO_QUIRKS))
    for quirk in ("denormalized_twice", "hard_clamp", "masked", "grid"):
        quirks = replace(NO_QUIRKS, **{quirk: getattr(Quirks(), quirk)})
        _, changed = accumulated(ours, published_with(ours, quirks))
        assert relative(changed, plain) > 1e-4, quirk


def test_all_three_networks_run_both_halves_of_every_sample(ours):
    networks = setups._networks(ours)
    rows = []
    for network in networks:
        network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    accumulated(ours, published_with(ours, NO_QUIRKS, networks))
    assert rows == [12, 12, 12]
    trained = [[name for name, p in network.named_parameters() if p.requires_grad] for network in networks]
    assert trained == [list(ours.backbone.policy_parameters), [], []]
    storages = {id(p) for network in networks for p in network.parameters()}
    assert len(storages) == sum(len(list(network.parameters())) for network in networks)


def published_with(ours: Ours, quirks: Quirks, networks=None) -> Published:
    return Published(
        *(networks or setups._networks(ours)),
        ours.family.vae,
        ours.reward,
        ours.family.scheduler,
        num_inference_steps=STEPS,
        alpha=2.0,
        gamma=0.9,
        guidance_scale=GUIDANCE,
        quirks=quirks,
    )


def accumulated(ours: Ours, published: Published):
    family, batch = ours.family, ours.batch
    embeddings = family.encode([""] * 6 + batch.prompts).tensors
    noise = philox_normal(ours.seeds, (4, 8, 8), dtype=torch.float64)
    found = published.accumulate(batch.x, batch.index, embeddings, batch.prompts, noise)
    trained = dict(published.policy.named_parameters())
    return found, torch.cat([trained[name].grad.flatten() for name in ours.backbone.policy_parameters])


def test_only_epsilon_prediction_was_published(ours):
    scheduler = type(ours.family.scheduler).from_config(ours.family.scheduler.config, prediction_type="v_prediction")
    ours.family.scheduler = scheduler
    with pytest.raises(ValueError, match="not v_prediction"):
        published_with(ours, NO_QUIRKS)


def test_wider_arithmetic_has_the_same_weights():
    small = problem("shapes", "cpu", toy=True)
    narrow, wide = Ours(small), Ours(small, torch.float64)
    for module in ("network", "vae"):
        pairs = zip(getattr(narrow.family, module).parameters(), getattr(wide.family, module).parameters(), strict=True)
        assert all(two.dtype == torch.float64 and torch.equal(one.double(), two) for one, two in pairs)
    assert torch.equal(narrow.batch.x.double(), wide.batch.x)
    assert torch.equal(
        narrow.family.encode(["a red circle"]).tensors["encoder_hidden_states"].double(),
        wide.family.encode(["a red circle"]).tensors["encoder_hidden_states"],
    )


def test_parity_refuses_what_is_wrong_and_everything_when_the_baseline_is(monkeypatch):
    small = problem("shapes", "cpu", toy=True)
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(measure, "Ours", lambda *given: type("Stub", (), {"step": lambda self, name: step(truth)})())
    steps = {
        PUBLISHED: step(truth * (1 + 1e-6)),
        "joint": step(truth * (1 - 2e-6)),
        "staged": step(truth * (1 + 4e-6)),
        "staged + checkpointing": step(truth * float("nan")),
    }
    faults, errors = measure.parity(small, steps)
    assert set(faults) == {"staged", "staged + checkpointing"}
    assert "relative error 4.00e-06, budget 3.00e-06" in faults["staged"]
    assert errors["joint"] == pytest.approx(2e-6)
    faults, _ = measure.parity(small, {**steps, PUBLISHED: step(truth * 1.01)})
    assert set(faults) == set(steps)
    assert all("the published way's gradient has relative error 1.00e-02" in fault for fault in faults.values())


def step(gradient: torch.Tensor) -> Step:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))

    def call() -> None:
        parameter.grad = gradient.clone()

    return Step(lambda: None, call, [parameter], (), lambda announced: None)


def test_memory_is_weights_and_what_each_stage_allocates():
    weight = torch.nn.Linear(256, 256, bias=False)  # 256 KiB
    announced = []

    def call() -> None:
        announced[-1]("first")
        held = torch.empty(1 << 20, dtype=torch.uint8)
        torch.empty(3 << 20, dtype=torch.uint8)
        announced[-1]("second")
        del held
        torch.empty(2 << 20, dtype=torch.uint8)

    def watch(callback) -> None:
        announced.append(callback)

    watch(lambda name: None)
    _, resident, stages = measure.memory(Step(lambda: None, call, [], (weight, weight), watch), "cpu")
    assert resident == 256 * 1024
    assert stages == {"first": resident + (4 << 20), "second": resident + (2 << 20)}


def test_flops_count_attention_on_the_cpu_and_what_is_checkpointed():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def multiply() -> None:
        (q @ q.mT).sum().backward()

    # Two products of 16 x 8 x 16 multiply-adds in each of two heads; one and its two gradients.
    assert measure.flops(Step(lambda: None, attend, [], (), lambda announced: None)) == 2 * 2 * 2 * 16 * 8 * 16
    assert measure.flops(Step(lambda: None, multiply, [], (), lambda announced: None)) == 3 * 2 * 2 * 16 * 8 * 16


def test_a_whole_step_has_its_share_of_a_refill():
    assert measure.whole_step_flops(step=100, trajectory=40, batch=4) == {"1": 260.0, "8": 120.0}


def test_a_fault_of_the_prediction_is_no_missing_prediction(monkeypatch):
    def fails(given, name):
        raise KeyError("transition")

    monkeypatch.setattr(prediction, "stage_bytes", fails)
    with pytest.raises(KeyError, match="transition"):
        measure.predicted(problem("shapes", "cpu"), "staged")


def test_utilisation_needs_a_known_gpu(monkeypatch):
    card = problem("sd15", "cuda")
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA Something 1", None),
    ):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert prediction.peak_flops(card) == flops
    assert prediction.peak_flops(problem("shapes", "cpu")) is None


def test_a_met_target_and_one_that_is_not():
    row = {"op": "training_step", "implementation": "staged", "fault": None, "size": "shapes"}
    found = verdicts([{**row, "training_step_of_joint": {"1": 1.2, "8": 1.205}}])
    assert [met for _, met in found] == [True, False]
    assert found[1][0].endswith("replay ratio 8: staged takes 1.205 x the FLOPs of joint, at most 1.2, NOT MET")
