"""Predictions for the embedded world against what PyTorch's allocator reports of the same real step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.marks import slow

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, make_config, with_settings
from sqdf_fast.engine import ModuleGroups, make_executor
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.engine.optimizers import clip_grad_norm, make_optimizer
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.families import load_family
from sqdf_fast.families.loading import family_from_configs
from sqdf_fast.plan.simulate import Simulation
from sqdf_fast.plan.workspace import on_cpu
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.registry import reward_from_config

CONFIG = make_config("shapes")
BATCH = 4
PROMPTS = ["a red circle", "a blue square", "a green star", "a yellow ring"]


WHOLE = with_settings(CONFIG, {"policy.kind": "full", "optimizer.kind": "adamw8bit"})


def simulation(dtype, consistency, config=CONFIG):
    family = family_from_configs("shapes", device=torch.device("meta"), dtype=dtype)
    reward = reward_from_config("taste", device="meta", dtype=dtype)
    return Simulation(config, family, reward, workspace=on_cpu, granularity=1, consistency=consistency)


def real_policy(dtype, config=CONFIG):
    family = load_family("shapes", device=torch.device("cpu"), dtype=dtype)
    return Backbone(family, rank=8, kind=config.policy.kind, consistency_lora=family.default_consistency_lora())


def real_step(execution, dtype, config=CONFIG, updated=False):
    """A function that runs one step, its update too where asked for, after a first one; and the family."""
    backbone = real_policy(dtype, config)
    family, reward = backbone.family, load_reward("taste", device="cpu", dtype=dtype)
    parameters = list(backbone.policy_parameters.values())
    optimizer = make_optimizer(parameters, config.optimizer, family.device)
    executor = make_executor(
        backbone,
        family.schedule(20, 1.0),
        reward,
        config.objective,
        guidance_scale=config.sampling.guidance_scale,
        execution=execution,
        groups=ModuleGroups(backbone, reward),
        impl="reference",
    )
    x = torch.randn(BATCH, *family.latent_shape, dtype=torch.float16)
    batch = ReplayBatch(x, torch.zeros(BATCH, dtype=torch.long), PROMPTS, torch.arange(BATCH))

    def run():
        for parameter in parameters:
            parameter.grad = None
        executor.accumulate(batch, torch.arange(BATCH))
        if updated:
            clip_grad_norm(optimizer, config.optimizer.max_grad_norm)
            optimizer.step()

    run()
    for parameter in parameters:
        parameter.grad = None
    return run, family


CHECKPOINTED = {"gradient_checkpointing": ALL_GROUPS}
STAGED = Execution(forward_batch_rows=4, backward_batch_rows=2, decode_images=1)
JOINT = Execution(executor="joint", micro_batch=2)
STAGED_CHECKPOINTED, JOINT_CHECKPOINTED = (execution.model_copy(update=CHECKPOINTED) for execution in (STAGED, JOINT))


@pytest.mark.parametrize(
    ("execution", "dtype"),
    [
        slow(STAGED, torch.float32, id="staged 32"),
        slow(STAGED_CHECKPOINTED, torch.float64, id="staged checkpointed 64"),
        pytest.param(JOINT, torch.float32, id="joint 32"),
        slow(JOINT_CHECKPOINTED, torch.float64, id="joint checkpointed 64"),
        slow(STAGED_CHECKPOINTED, torch.float32, id="staged checkpointed 32"),
    ],
)
def test_the_allocators_peak_of_a_real_step_is_predicted_within_two_per_cent(execution, dtype, allocated_peak):
    run, family = real_step(execution, dtype)
    real = allocated_peak(run)
    counted = simulation(dtype, family.default_consistency_lora()).run(execution, BATCH)
    # The weights were there before; the profiler has seen what came on top.
    assert beside(counted, "weights") == pytest.approx(real, rel=0.02)


@pytest.fixture(scope="module")
def embedded():
    return simulation(torch.float32, load_family_lora())


def load_family_lora():
    return load_family("shapes", device=torch.device("cpu"), dtype=torch.float32).default_consistency_lora()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [slow(CONFIG, id="LoRA, AdamW"), pytest.param(WHOLE, id="whole network, 8-bit AdamW")]
)
def test_a_step_with_its_update_is_predicted_within_two_per_cent(config, allocated_peak):
    execution = STAGED_CHECKPOINTED
    run, family = real_step(execution, torch.float32, config, updated=True)
    real = allocated_peak(run)
    counted = simulation(torch.float32, family.default_consistency_lora(), config).run(
        execution, BATCH, optimizer=config.optimizer
    )
    # Weights and states were there before.
    assert beside(counted, "weights", "optimizer") == pytest.approx(real, rel=0.02)


@pytest.mark.slow
def test_a_step_whose_parts_come_and_go_is_predicted_within_two_per_cent(embedded, allocated_peak):
    execution = STAGED_CHECKPOINTED.model_copy(update={"offload": "staged"})
    run, _ = real_step(execution, torch.float32)
    # What is there when the profiler begins is unknown to it: a first step brings every part anew.
    real = allocated_peak(lambda: (run(), run()))
    weights = embedded.run(Execution(), 1).stages["reward"].at_peak["weights"]
    still = weights - sum(embedded.frozen_bytes().values())
    assert embedded.run(execution, BATCH).peak_bytes - still == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "adapter"])
def test_sampling_is_predicted_within_two_per_cent(embedded, merged, allocated_peak):
    settings = {"sampling.batch_size": BATCH, "sampling.merge_lora": merged, "impl": "reference"}
    runtime = Runtime(with_settings(CONFIG, settings), real_policy(torch.float32))

    def run():
        runtime.sample(PROMPTS, torch.arange(BATCH), stop=2)

    run()
    real = allocated_peak(run)
    counted = embedded.run(Execution(), 1, sampled=BATCH, merged=merged)
    assert beside(only(counted, "sampling"), "weights") == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("images", [1, 3])
def test_decoding_is_predicted_within_two_per_cent(embedded, images, allocated_peak):
    execution = Execution(decode_images=images)
    runtime = Runtime(CONFIG.model_copy(update={"execution": execution}), real_policy(torch.float32))
    latents = torch.randn(images, *runtime.family.latent_shape)
    runtime.decode(latents)
    real = allocated_peak(lambda: runtime.decode(latents))
    counted = only(embedded.run(execution, 1, sampled=BATCH), "sampled images")
    # Latents and schedule were there before, too.
    before = latents.nbytes + tables_bytes(runtime)
    assert beside(counted, "weights") - before == pytest.approx(real, rel=0.02)


def tables_bytes(runtime):
    tables = runtime.sampler.schedule
    return sum(value.nbytes for value in vars(tables).values() if isinstance(value, torch.Tensor))


def test_images_are_decoded_as_many_at_once_as_the_execution_says_whatever_the_sampler_batch(embedded):
    def peak(images, sampled):
        counted = embedded.run(Execution(decode_images=images), 1, sampled=sampled)
        return beside(only(counted, "sampled images"), "weights")

    assert peak(2, sampled=1) == peak(2, sampled=2) == peak(2, sampled=8)
    assert peak(4, sampled=2) == pytest.approx(2 * peak(2, sampled=2), rel=0.05)


def only(counted, name):
    return replace(counted, stages={name: counted.stages[name]})


def beside(counted, *kinds):
    """The peak without what was on the device before."""
    return max(
        stage.peak_bytes - sum(stage.at_peak.get(kind, 0) for kind in kinds) for stage in counted.stages.values()
    )


@pytest.mark.slow
def test_activations_of_every_stage_grow_in_a_straight_line_with_the_chunk(embedded):
    peaks = []
    for size in (1, 2, 3):
        execution = Execution(forward_batch_rows=2 * size, backward_batch_rows=2 * size, decode_images=size)
        peaks.append(embedded.run(execution, 6).stages)
    for name in ("reward", "look-ahead vjp", "policy vjp"):
        one, two, three = (run[name].peak_bytes for run in peaks)
        assert three - two == pytest.approx(two - one, rel=0.02), name
        assert peaks[1][name].at_peak["activations"] <= 2 * peaks[0][name].at_peak["activations"], name


def test_a_larger_batch_costs_latents_alone(embedded):
    execution = Execution(forward_batch_rows=2, backward_batch_rows=2, decode_images=1)
    small, large = (embedded.run(execution, samples) for samples in (2, 10))
    latents = embedded.family.latent_shape
    one = 4 * latents[0] * latents[1] * latents[2]
    for name, stage in large.stages.items():
        assert stage.peak_bytes - small.stages[name].peak_bytes <= 8 * 12 * one, name


def test_gradient_checkpointing_trades_arithmetic_for_memory(embedded):
    kept, again = (embedded.run(Execution(gradient_checkpointing=parts), 2) for parts in ((), ALL_GROUPS))
    for name in ("reward", "policy vjp"):
        assert again.stages[name].peak_bytes < kept.stages[name].peak_bytes
        assert again.stages[name].flops > kept.stages[name].flops
    assert again.stages["transition"].flops == kept.stages["transition"].flops


def test_parts_that_come_and_go_are_on_the_device_in_their_stages_alone(embedded):
    resident = embedded.run(Execution(), 2)
    staged = embedded.run(Execution(offload="staged"), 2)
    frozen = embedded.frozen_bytes()
    everything = resident.stages["policy vjp"].at_peak["weights"]
    absent = frozen["decoder"] + frozen["reward"]
    # A part comes as one block, in which every tensor begins at a round address.
    assert staged.stages["policy vjp"].at_peak["weights"] == pytest.approx(everything - absent, rel=0.03)
    assert staged.stages["reward"].at_peak["weights"] == pytest.approx(everything - frozen["network"], rel=0.03)
    again = embedded.run(Execution(), 2)
    assert again.stages["policy vjp"] == resident.stages["policy vjp"]
    assert staged.uploads["reward"] == absent
    assert staged.uploads["look-ahead vjp"] == frozen["network"]


def test_the_optimizers_states_are_counted_where_they_are(embedded):
    elements, _ = embedded.trained()
    here = embedded.run(Execution(), 2, optimizer=CONFIG.optimizer)
    there = embedded.run(Execution(), 2, optimizer=CONFIG.optimizer.model_copy(update={"states": "cpu"}))
    steps = 4 * len(embedded.backbone.policy_parameters)
    assert here.stages["reward"].at_peak["optimizer"] == 8 * elements + steps
    assert there.stages["reward"].at_peak["optimizer"] == 0


def test_sampling_counts_a_whole_trajectory(embedded):
    steps = embedded.run(Execution(), 1, sampled=2)
    plain = embedded.run(Execution(forward_batch_rows=8), 2).stages["transition"].flops / 2
    # A network call of two samples' rows, without adapters, at each of the steps.
    assert 0.9 * 20 * plain < steps.stages["sampling"].flops < 1.1 * 20 * plain
    adapted = embedded.run(Execution(), 1, sampled=2, merged=False).stages["sampling"]
    assert steps.stages["sampling"].operators < adapted.operators
    assert steps.stages["sampling"].peak_bytes > adapted.peak_bytes
