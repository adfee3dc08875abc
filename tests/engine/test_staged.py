"""The staged executor gives the joint executor's gradients, whatever the chunks, and really frees what it says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.marks import slow

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine import Executor, make_executor
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.staged import STAGES
from sqdf_fast.families import load_family
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.rewards import Reward, load_reward

PROMPTS = ["a red star", "a blue ring", "a ring", "a star", "a red ring"]
SEEDS = sample_seeds(0, Stream.TRANSITION, 0, 5)
INDEX = [0, 3, 1, 2, 3]
CHUNKS = [
    {"forward_batch_rows": 1, "backward_batch_rows": 1, "decode_images": 1},
    {"forward_batch_rows": 3, "backward_batch_rows": 2, "decode_images": 3},
    {"forward_batch_rows": 64, "backward_batch_rows": 64, "decode_images": 64},
]
LOOKAHEADS = [
    {"lookahead": "tweedie"},
    {"lookahead": "consistency"},
    {"lookahead": "deterministic", "lookahead_steps": 3},
]


@pytest.fixture(scope="module")
def consistency_lora(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("consistency")
    backbone = Backbone(load_family(str(model), device=torch.device("cpu"), dtype=torch.float32), rank=2, seed=5)
    stir(backbone, 0.3)
    backbone.family.save_lora(folder, "policy")
    return str(folder)


def stir(backbone: Backbone, amount: float = 0.1) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(backbone.policy_parameters.values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise.to(parameter.dtype), alpha=amount)


def brightness(images: torch.Tensor, prompts) -> torch.Tensor:
    scale = torch.tensor([len(prompt) for prompt in prompts], dtype=images.dtype)
    return (images - 0.3).square().mean(dim=(1, 2, 3)) * scale


def make(model, lora, *, dtype=torch.float64, kind="lora", execution, guidance_scale=3.0, **objective) -> Executor:
    family = load_family(str(model), device=torch.device("cpu"), dtype=dtype)
    backbone = Backbone(family, rank=2, kind=kind, consistency_lora=lora)
    stir(backbone)
    return make_executor(
        backbone,
        family.schedule(4, 1.0),
        brightness,
        Objective(**objective),
        guidance_scale=guidance_scale,
        execution=execution,
    )


def batch(index: list[int], dtype=torch.float64) -> ReplayBatch:
    x = torch.randn(len(index), 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return ReplayBatch(x.to(dtype), torch.tensor(index), PROMPTS[: len(index)], torch.arange(len(index)))


def gradients(found: Executor) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in found.backbone.policy_parameters.values()])


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


JOINT = Execution(executor="joint", micro_batch=5)


@pytest.mark.parametrize("objective", LOOKAHEADS, ids=lambda objective: objective["lookahead"])
@pytest.mark.parametrize(
    "chunks", [*CHUNKS[:2], slow(CHUNKS[2])], ids=lambda chunks: f"chunks of {chunks['backward_batch_rows']}"
)
def test_equals_the_joint_executor(model, consistency_lora, objective, chunks):
    joint = make(model, consistency_lora, execution=JOINT, alpha=50.0, **objective)
    staged = make(model, consistency_lora, execution=Execution(**chunks), alpha=50.0, **objective)
    one, two = (found.accumulate(batch(INDEX), SEEDS) for found in (joint, staged))
    assert relative(gradients(staged), gradients(joint)) < 1e-12
    for name in ("loss", "reward", "kl"):
        assert torch.allclose(getattr(two, name), getattr(one, name), rtol=1e-12, atol=0)


# How far float32 rounding alone moves a gradient depends on the processor: the measure is the joint executor's own
# distance from itself in float64. Staged has an error of that size too, and merges the look-ahead's LoRA.
ROUNDING_ERRORS = 3


def make_world(dtype: torch.dtype) -> tuple[Backbone, Reward]:
    """The embedded world, its policy away from the reference."""
    family = load_family("shapes", device=torch.device("cpu"), dtype=dtype)
    backbone = Backbone(family, rank=8, consistency_lora=family.default_consistency_lora())
    stir(backbone, 0.02)
    return backbone, load_reward("taste", device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def world() -> tuple[Backbone, Reward]:
    return make_world(torch.float32)


@pytest.fixture(scope="module")
def exact_world() -> tuple[Backbone, Reward]:
    return make_world(torch.float64)


def in_the_world(world, execution: Execution, guidance_scale: float = 4.0, **objective) -> torch.Tensor:
    """The gradient of three samples."""
    backbone, reward = world
    executor = make_executor(
        backbone,
        backbone.family.schedule(20, 1.0),
        reward,
        Objective(**objective),
        guidance_scale=guidance_scale,
        execution=execution,
    )
    for parameter in backbone.policy_parameters.values():
        parameter.grad = None
    x = torch.randn(3, *backbone.family.latent_shape, generator=torch.Generator().manual_seed(1))
    x = x.to(backbone.family.precision)
    prompts = ["a red circle", "a blue square", "a green star"]
    executor.accumulate(ReplayBatch(x, torch.tensor([2, 9, 15]), prompts, torch.arange(3)), SEEDS[:3])
    return gradients(executor).double()


@pytest.mark.parametrize("lookahead", [slow("tweedie"), "consistency"])
def test_in_float64_every_chunking_of_the_embedded_world_is_the_joint_executor(exact_world, lookahead):
    joint = in_the_world(exact_world, Execution(executor="joint", micro_batch=3), lookahead=lookahead)
    for chunks in CHUNKS:
        staged = in_the_world(exact_world, Execution(**chunks), lookahead=lookahead)
        assert relative(staged, joint) < 1e-12, chunks


@pytest.mark.parametrize(
    ("lookahead", "guidance_scale", "size"),
    # A consistency model runs without guidance: beside a guided policy its chunks have the joint executor's number of
    # rows where all samples are one chunk.
    [
        slow("tweedie", 4, 1),
        ("tweedie", 4, 2),
        slow("consistency", 4, 3),
        ("consistency", 1, 1),
        slow("consistency", 1, 2),
    ],
)
def test_in_float32_it_is_the_joint_executor_at_the_same_chunks(world, exact_world, lookahead, guidance_scale, size):
    rows = size if guidance_scale == 1 else 2 * size
    joint = Execution(executor="joint", micro_batch=size)
    staged = Execution(forward_batch_rows=rows, backward_batch_rows=rows, decode_images=size)
    one, two = (in_the_world(world, found, guidance_scale, lookahead=lookahead) for found in (joint, staged))
    exact = in_the_world(exact_world, joint, guidance_scale, lookahead=lookahead)
    assert relative(two, one) < ROUNDING_ERRORS * relative(one, exact)


@pytest.fixture
def row_by_row(world, monkeypatch) -> None:
    """Network, decoder and reward compute one row at a time: no operator rounds differently at another batch size."""
    backbone, reward = world
    family = backbone.family
    predict, decode, score = family.predict, family.decode, reward.forward

    def each(run, *rows):
        return torch.cat([run(*(row[i : i + 1] for row in rows)) for i in range(len(rows[0]))])

    monkeypatch.setattr(family, "predict", lambda network, *rows: each(partial(predict, network), *rows))
    monkeypatch.setattr(family, "decode", lambda latents: each(decode, latents))
    monkeypatch.setattr(reward, "forward", lambda images, prompts: each(score, images, prompts))


@pytest.mark.slow
@pytest.mark.usefixtures("row_by_row")
def test_in_float32_every_chunking_is_the_joint_executor_beside_the_operators_rounding(world, exact_world):
    joint, exact = (in_the_world(w, Execution(executor="joint", micro_batch=3)) for w in (world, exact_world))
    for chunks in CHUNKS:
        staged = in_the_world(world, Execution(**chunks))
        assert relative(staged, joint) < ROUNDING_ERRORS * relative(joint, exact), chunks


def test_chunks_hold_whole_samples_and_no_more_rows_than_allowed(model, consistency_lora):
    rows = []
    for backward_batch_rows in (1, 2, 5):
        found = make(
            model, consistency_lora, execution=Execution(forward_batch_rows=1, backward_batch_rows=backward_batch_rows)
        )
        run = found.backbone.run
        found.backbone.run = lambda given, run=run: rows.append(len(given)) or run(given)
        found.on_stage = lambda stage: stage == "policy vjp" and rows.clear()
        found.accumulate(batch(INDEX), SEEDS)
        assert rows == {1: [1] * 10, 2: [2] * 5, 5: [4, 4, 2]}[backward_batch_rows]


@pytest.mark.parametrize(
    "objective",
    [{"mask_nonpositive": True}, {"credit": "posterior"}, {"kl_scale": 0.5, "gamma": 0.7}],
    ids=lambda objective: next(iter(objective)),
)
def test_every_form_of_the_loss(model, consistency_lora, objective):
    joint, staged = (
        make(model, consistency_lora, execution=execution, alpha=50.0, **objective)
        for execution in (JOINT, Execution(backward_batch_rows=2))
    )
    for found in (joint, staged):
        found.accumulate(batch(INDEX), SEEDS)
    assert relative(gradients(staged), gradients(joint)) < 1e-12


def test_without_guidance_a_sample_is_one_row(model, consistency_lora):
    joint, staged = (
        make(model, consistency_lora, execution=execution, guidance_scale=1.0) for execution in (JOINT, Execution())
    )
    for found in (joint, staged):
        found.accumulate(batch(INDEX), SEEDS)
    assert relative(gradients(staged), gradients(joint)) < 1e-12
    # 5 policy, 5 reference, 3 look-aheads; policy and look-ahead once more in their VJPs
    assert (joint.backbone.evaluations, staged.backbone.evaluations) == (13, 13 + 8)


def test_every_parameter_of_a_fully_trained_network(model, consistency_lora):
    joint, staged = (
        make(model, consistency_lora, kind="full", execution=execution, alpha=50.0)
        for execution in (JOINT, Execution(backward_batch_rows=3))
    )
    reference = [parameter.clone() for parameter in staged.backbone.family.network.parameters()]
    for found in (joint, staged):
        result = found.accumulate(batch(INDEX), SEEDS)
        assert result.kl.min() > 0
    assert relative(gradients(staged), gradients(joint)) < 1e-12
    unchanged = zip(reference, staged.backbone.family.network.parameters(), strict=True)
    assert all(torch.equal(before, after) and after.grad is None for before, after in unchanged)


def test_blocks_are_recomputed_and_the_gradient_stays(model, consistency_lora):
    plain = make(model, consistency_lora, execution=Execution())
    blocks = make(model, consistency_lora, execution=Execution(gradient_checkpointing=("network", "decoder")))
    for found in (plain, blocks):
        found.accumulate(batch([0, 1]), SEEDS[:2])
    assert relative(gradients(blocks), gradients(plain)) < 1e-12
    (network,), (decoder,) = (blocks.groups.checkpointed[name] for name in ("network", "decoder"))
    # Two images. The network: two guidance halves of the policy, whose first two blocks come before any LoRA and have
    # no graph, and one look-ahead each.
    assert (network.count, decoder.count) == ((network.blocks - 2) * 4 + network.blocks * 2, decoder.blocks * 2)
    assert min(network.blocks, decoder.blocks) > 3


def test_the_last_index_is_scored_without_a_look_ahead(model, consistency_lora):
    found = make(model, consistency_lora, execution=Execution())
    found.accumulate(batch([3, 3]), SEEDS[:2])
    # two halves of two samples: policy, reference, and the policy's VJP
    assert found.backbone.evaluations == 2 * 2 * 3


def test_stages_are_named_in_their_order_and_gradients_accumulate(model, consistency_lora):
    found, seen = make(model, consistency_lora, execution=Execution()), []
    found.on_stage = seen.append
    found.accumulate(batch([0, 1]), SEEDS[:2])
    once = gradients(found).clone()
    found.accumulate(batch([0, 1]), SEEDS[:2])
    assert tuple(seen) == STAGES * 2
    assert relative(gradients(found), 2 * once) < 1e-12


def test_a_fresh_policy_has_no_kl_and_no_gradient_of_it(model, consistency_lora):
    found = make(model, consistency_lora, execution=Execution(forward_batch_rows=3), alpha=1e6)
    with torch.no_grad():
        for name, parameter in found.backbone.policy_parameters.items():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(found.accumulate(batch(INDEX), SEEDS).kl, torch.zeros(5))
    held = gradients(found)
    found.objective = found.objective.model_copy(update={"alpha": 0.0})
    for parameter in found.backbone.policy_parameters.values():
        parameter.grad = None
    found.accumulate(batch(INDEX), SEEDS)
    assert torch.equal(gradients(found), held)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_frozen_weights_are_there_in_their_stages_only(model, consistency_lora, kind):
    plain = make(model, consistency_lora, kind=kind, execution=Execution())
    moving = make(model, consistency_lora, kind=kind, execution=Execution(offload="staged"))
    family, here = moving.backbone.family, {}

    def frozen_bytes(module):
        return sum(tensor.nbytes for tensor in module.parameters() if not tensor.requires_grad)

    def note(stage):
        # at the begin of a stage what it does not need has left, and what it needs may be on its way
        here[stage] = frozen_bytes(family.network) > 0, frozen_bytes(family.vae) > 0

    moving.on_stage = note
    for _ in range(2):
        for found in (plain, moving):
            found.accumulate(batch(INDEX), SEEDS)
    assert relative(gradients(moving), gradients(plain)) < 1e-14
    # in full-parameter mode the frozen network leaves before the policy's VJP, and comes back for the next step
    nothing, network = (False, False), (True, False)
    assert here == {
        "transition": nothing if kind == "full" else network,
        "look-ahead": network,
        "reward": nothing,
        "look-ahead vjp": nothing,
        "policy vjp": nothing if kind == "full" else network,
    }
    moving.groups.apply(Execution())
    assert frozen_bytes(family.network) == frozen_bytes(plain.backbone.family.network)
    unchanged = zip(family.network.parameters(), plain.backbone.family.network.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in unchanged)


@pytest.mark.parametrize("executor", ["joint", "staged"])
@pytest.mark.parametrize("place", ["network", "decoder", "reward"])
def test_a_librarys_lack_of_memory_is_that_of_the_allocator(model, executor, place, monkeypatch):
    found = make(model, None, execution=Execution(executor=executor), lookahead="tweedie")

    def fails(*given):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    owner, name = {
        "network": (found.backbone.family, "predict"),
        "decoder": (found.backbone.family, "decode"),
        "reward": (found, "reward"),
    }[place]
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(torch.OutOfMemoryError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        found.accumulate(batch([0, 1]), SEEDS[:2])
