from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.marks import slow

from sqdf_fast.backbone import Backbone
from sqdf_fast.engine import compilation
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.schedule import DenoisingSchedule

PROMPTS = ["a red star", "a blue ring", "a ring"]


def sampler(model: Path, batch_size: int = 3, dtype: torch.dtype = torch.float64, **settings: Any) -> Sampler:
    family = load_family(str(model), device=torch.device("cpu"), dtype=dtype)
    backbone = Backbone(family, rank=2)
    schedule = DenoisingSchedule.from_scheduler(family.scheduler, 4, 1.0)
    return Sampler(backbone, schedule, guidance_scale=3.0, batch_size=batch_size, **settings)


def trained(model: Path, **settings: Any) -> Sampler:
    """With a policy that differs from the reference."""
    found = sampler(model, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.backbone.policy_parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def x0(found: Sampler, role: str = "policy") -> torch.Tensor:
    return found.sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3), role=role).x0


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def test_equals_the_diffusers_pipeline_on_the_same_noise(model):
    """x_0 of plain diffusers: its own DDIM step, eta 1, fed the noise of our seeds."""
    seeds = sample_seeds(0, Stream.EVALUATION, 0, 3)
    ours = sampler(model).sample(PROMPTS, seeds, role="reference").x0
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float64)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    states, empty = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    x = philox_normal(derive_seeds(Stream.INITIAL, ids=seeds), (4, 8, 8), dtype=torch.float64)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            uncond, cond = pipeline.unet(torch.cat([x, x]), t, torch.cat([empty, states])).sample.chunk(2)
            noise = philox_normal(derive_seeds(Stream.DENOISING, i, ids=seeds), (4, 8, 8), dtype=torch.float64)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, eta=1.0, variance_noise=noise).prev_sample
    # The scheduler holds its alphas in float32.
    assert torch.allclose(ours, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(model, batch_size):
    seeds = sample_seeds(0, Stream.REFILL, 0, 3)
    whole = sampler(model).sample(PROMPTS, seeds, keep="trainable")
    parts = sampler(model, batch_size).sample(PROMPTS, seeds, keep="trainable")
    assert torch.allclose(whole.x0, parts.x0, rtol=0, atol=1e-12)
    assert torch.allclose(whole.states, parts.states, rtol=0, atol=1e-12)


def test_states_are_those_at_the_trainable_indices(model):
    found = sampler(model)
    result = found.sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3), keep="trainable")
    assert result.states.shape == (3, int(found.schedule.trainable.sum()), 4, 8, 8)
    first = philox_normal(
        derive_seeds(Stream.INITIAL, ids=sample_seeds(0, Stream.REFILL, 0, 3)), (4, 8, 8), dtype=torch.float64
    )
    assert torch.equal(result.states[:, 0], first)


def test_all_states_are_the_trajectory_and_follow_from_one_another(model):
    found, seeds = trained(model, merge_lora=False), sample_seeds(0, Stream.REFILL, 0, 3)
    result, some = (found.sample(PROMPTS, seeds, keep=keep) for keep in ("all", "trainable"))
    states = result.states
    assert states.shape == (3, 5, 4, 8, 8)
    assert torch.equal(states[:, -1], result.x0)
    assert torch.equal(states[:, :-1][:, found.schedule.trainable], some.states)
    family, i = found.backbone.family, 2
    with torch.no_grad(), found.backbone.role("policy"):
        m = found.backbone.predict(
            states[:, i], found.schedule.timesteps[[i] * 3], family.encode(PROMPTS), family.encode([""])
        )
    unconditional, conditional = m.chunk(2)
    p, q, sigma = found.schedule.transition[i]
    z = (states[:, i + 1] - p * states[:, i] - q * (unconditional + 3 * (conditional - unconditional))) / sigma
    expected = philox_normal(derive_seeds(Stream.DENOISING, i, ids=seeds), (4, 8, 8), dtype=torch.float64)
    assert apart(z, expected) < 1e-10


def test_nothing_is_kept_unless_asked_for(model):
    assert sampler(model).sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3)).states is None


def test_progress_counts_network_calls(model):
    seen = []
    seeds = sample_seeds(0, Stream.REFILL, 0, 3)
    sampler(model, batch_size=2).sample(PROMPTS, seeds, on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_streams_do_not_share_noise():
    seeds = torch.cat([sample_seeds(seed, stream, step, 4) for seed in (0, 1) for stream in Stream for step in (0, 1)])
    assert len(seeds.unique()) == len(seeds)


def test_merged_lora_samples_what_the_adapter_samples(model):
    adapter, merged = trained(model, merge_lora=False), trained(model)
    weights = {name: tensor.clone() for name, tensor in merged.backbone.family.network.state_dict().items()}
    assert apart(x0(merged), x0(adapter)) < 1e-12
    assert apart(x0(merged), x0(merged, "reference")) > 1e-2
    after = merged.backbone.family.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_no_adapter_runs_while_merged(model, monkeypatch):
    calls = []
    found = trained(model)
    for name, module in found.backbone.family.network.named_modules():
        if name.endswith("lora_A.policy"):
            module.register_forward_hook(lambda *_: calls.append(1))
    x0(found)
    assert calls == []
    found.merge_lora = False
    x0(found)
    assert len(calls) == len(found.backbone.policy_parameters) // 2 * len(found.schedule)


def test_channels_last_changes_the_layout_alone(model):
    found = trained(model, channels_last=True)
    convolutions = [p for p in found.backbone.family.network.parameters() if p.dim() == 4 and p.shape[-1] == 3]
    assert convolutions
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    assert apart(x0(found), x0(trained(model))) < 1e-12


@pytest.fixture
def traced(monkeypatch):
    """Blocks go through torch.compile up to its backend, which runs what was traced: no compiler is waited for."""
    monkeypatch.setattr("sqdf_fast.engine.sampler.compile_options", lambda *_: {"backend": "eager"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("merge_lora", [slow(True), False])
def test_compiled_blocks_sample_what_the_uncompiled_do_in_every_role(model, traced, merge_lora):
    plain = trained(model, merge_lora=merge_lora)
    compiled = trained(model, merge_lora=merge_lora, compilation="regional")
    for role in ("policy", "reference", "policy"):
        assert apart(x0(compiled, role), x0(plain, role)) < 1e-12
    # Nothing fell back: every block in one piece, and the four share their graphs.
    assert sum(traced["graph_break"].values()) == 0
    assert traced["stats"]["unique_graphs"] == (1 if merge_lora else 2)


def test_a_step_of_the_policy_reaches_the_compiled_sampler(model, traced):
    plain, compiled = trained(model), trained(model, compilation="regional")
    before = x0(compiled)
    for found in (plain, compiled):
        with torch.no_grad():
            for parameter in found.backbone.policy_parameters.values():
                parameter.mul_(1.5)
    assert apart(x0(compiled), x0(plain)) < 1e-12
    assert apart(x0(compiled), before) > 1e-3


def test_training_runs_uncompiled_with_recomputation_between_compiled_samplings(model, traced):
    def gradients(found: Sampler) -> list[torch.Tensor]:
        backbone = found.backbone
        latents = torch.ones(2, 4, 8, 8, dtype=torch.float64)
        with backbone.role("policy"):
            m = backbone.predict(latents, torch.tensor([7, 500]), backbone.family.encode(PROMPTS[:2]))
            m.square().mean().backward()
        return [parameter.grad.clone() for parameter in backbone.policy_parameters.values()]

    plain, compiled = trained(model), trained(model, compilation="regional")
    for found in (plain, compiled):
        for checkpointed in found.backbone.checkpointed:
            checkpointed.enabled = True
    x0(compiled)
    graphs = traced["stats"]["unique_graphs"]
    assert graphs > 0
    expected, got = gradients(plain), gradients(compiled)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    assert compiled.backbone.checkpointed[0].count == plain.backbone.checkpointed[0].count > 0
    assert apart(x0(compiled), x0(plain)) < 1e-12
    assert traced["stats"]["unique_graphs"] == graphs


def test_blocks_that_cannot_be_compiled_are_a_user_error(model, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("sqdf_fast.engine.sampler.compile_options", lambda *_: {"backend": broken})
    found = trained(model, compilation="regional")
    with pytest.raises(UserError, match=r"no compiler.*sampling\.compile=none"):
        x0(found)
    torch._dynamo.reset()
    blocks = [b for b in found.backbone.family.network.modules() if type(b).__name__ == "BasicTransformerBlock"]
    assert [block._compiled_call_impl for block in blocks] == [None] * 4


def test_cuda_graphs_are_refused_on_a_cpu(model):
    with pytest.raises(UserError, match=r"cuda-graphs needs a CUDA device, not cpu; .*sampling\.compile=regional"):
        sampler(model, compilation="cuda-graphs")


def test_cuda_graphs_are_compiled_blocks_with_less_overhead():
    assert compilation.compile_options("cuda-graphs", torch.device("cuda")) == {"mode": "reduce-overhead"}


def test_a_network_without_such_blocks_is_refused():
    with pytest.raises(UserError, match="no block of class A, B"):
        compilation.CompiledBlocks(torch.nn.Linear(2, 2), {"B", "A"})


def test_blocks_to_compile_are_those_that_diffusers_names():
    network = torch.nn.Module()
    assert compilation.repeated_kinds(network, {"Ours"}) == {"Ours"}
    network._repeated_blocks = []
    assert compilation.repeated_kinds(network, {"Ours"}) == {"Ours"}
    network._repeated_blocks = ["Theirs"]
    assert compilation.repeated_kinds(network, {"Ours"}) == ["Theirs"]


def test_a_half_precision_network_samples_in_full_precision(model):
    exact, half = trained(model, dtype=torch.float32), trained(model, dtype=torch.bfloat16)
    result = half.sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3), keep="trainable")
    assert (result.x0.dtype, result.states.dtype) == (torch.float32, torch.bfloat16)
    visited = half.sample(PROMPTS, sample_seeds(0, Stream.REFILL, 0, 3), keep="all").states
    assert torch.equal(visited[:, -1], result.x0)
    assert apart(result.x0, x0(exact)) < 0.1
    assert apart(x0(half), x0(trained(model, dtype=torch.bfloat16, merge_lora=False))) < 0.1


@pytest.mark.parametrize("merge_lora", [True, False])
def test_sampling_reads_no_value_of_a_tensor(model, merge_lora):
    """So a plan can simulate it: on the meta device nothing has a value, and every branch is decided all the same."""
    found = sampler(model, batch_size=2, merge_lora=merge_lora, impl="reference")
    family = found.backbone.family
    family.network.to("meta")
    family.device = torch.device("meta")
    for prompt in ["", *PROMPTS]:
        family.remember(prompt, family.example_conditioning(1))
    result = found.sample(PROMPTS, torch.arange(3))
    assert (result.x0.device.type, tuple(result.x0.shape)) == ("meta", (3, 4, 8, 8))
    assert found.backbone.evaluations == 2 * 3 * len(found.schedule)


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_sampling_stops_at_a_state_of_the_whole_trajectory(model, stop):
    """The steps that follow, taken one by one, end where an uninterrupted trajectory does."""
    found, seeds, calls = trained(model, merge_lora=False), sample_seeds(0, Stream.REFILL, 0, 3), []
    before = found.backbone.evaluations
    x = found.sample(PROMPTS, seeds, stop=stop, on_progress=lambda done, total: calls.append((done, total))).x0
    assert found.backbone.evaluations - before == 2 * 3 * stop
    assert calls == [(i + 1, stop) for i in range(stop)]
    family, schedule = found.backbone.family, found.schedule
    conditioning, empty = family.encode(PROMPTS), family.encode([""])
    with torch.no_grad(), found.backbone.role("policy"):
        for i in range(stop, 4):
            m = found.backbone.predict(x, schedule.timesteps[[i] * 3], conditioning, empty)
            unconditional, conditional = m.chunk(2)
            p, q, sigma = schedule.transition[i]
            z = philox_normal(derive_seeds(Stream.DENOISING, i, ids=seeds), (4, 8, 8), dtype=torch.float64)
            x = p * x + q * (unconditional + 3 * (conditional - unconditional)) + sigma * z
    assert apart(x, x0(found)) < 1e-12
