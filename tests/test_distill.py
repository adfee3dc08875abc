from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support.tiny import write_pipeline

from sqdf_fast import shapes
from sqdf_fast.backbone import Backbone
from sqdf_fast.distill import (
    DISTILLATION_PRESETS,
    Accuracy,
    accuracy_table,
    distill,
    make_distillation,
    measure_accuracy,
)
from sqdf_fast.distill.distiller import Distiller, pseudo_huber
from sqdf_fast.distill.trajectories import Trajectories, guided_trajectories, lookaheads
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family
from sqdf_fast.kernels.philox import derive_seeds, philox_normal
from sqdf_fast.rewards import load_reward
from sqdf_fast.schedule import DenoisingSchedule

CPU = torch.device("cpu")
PROMPTS = ["a star", "a red ring", "a blue star"]
SMALL = {
    "num_trajectories": 8,
    "num_inference_steps": 4,
    "rank": 2,
    "target_modules": ["to_q", "conv1"],
    "steps": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "sampling_batch_size": 8,
    "evaluation_trajectories": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline whose output is strong enough to bend its trajectories, unlike freshly drawn weights."""
    folder = write_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.weight"] *= 4
    save_file(state, weights, metadata={"format": "pt"})
    return folder


def backbone_of(model: Path, dtype: torch.dtype = torch.float64, **keywords) -> Backbone:
    return Backbone(load_family(str(model), device=CPU, dtype=dtype), rank=2, **keywords)


def distiller_of(model: Path, dtype: torch.dtype = torch.float64, **settings) -> Distiller:
    family = load_family(str(model), device=CPU, dtype=dtype)
    return Distiller(family, PROMPTS, make_distillation(settings={**SMALL, **settings}))


def run(model: Path, output: Path, **settings):
    return distill(
        str(model),
        PROMPTS,
        output,
        make_distillation(settings={**SMALL, **settings}),
        device=CPU,
        dtype=torch.float32,
    )


def test_every_preset_is_valid():
    for name in DISTILLATION_PRESETS:
        assert make_distillation(name).num_trajectories >= 1


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("shape", {}, "preset 'shape' is unknown; allowed: default, shapes"),
        ("shapes", {"rnk": 3}, "setting 'rnk' is unknown; did you mean 'rank'?"),
        ("shapes", {"steps": 0}, "setting steps = 0 is not allowed: it must be greater than or equal to 1"),
        ("shapes", {"lr": float("nan")}, "setting lr = nan is not allowed: it must be a finite number"),
        ("shapes", {"target_modules": []}, "setting target_modules = [] is not allowed:"),
    ],
)
def test_bad_settings_are_refused_in_one_line(preset, settings, message):
    with pytest.raises(UserError) as error:
        make_distillation(preset, settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_lookaheads_sit_at_the_states_own_levels(model):
    family = load_family(str(model), device=CPU, dtype=torch.float64)
    schedule = DenoisingSchedule.from_scheduler(family.scheduler, 5)
    consistency, tweedie = lookaheads(schedule)
    alphas = family.scheduler.alphas_cumprod.double()
    expected = [801, 601, 401, 201, 1]
    assert consistency.timesteps[:, 0].tolist() == expected
    assert tweedie.timesteps[:, 0].tolist() == expected
    for state, t in enumerate(expected):
        a, b = 1 / alphas[t].sqrt(), -((1 - alphas[t]) / alphas[t]).sqrt()
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        torch.testing.assert_close(tweedie.rows[state, 0], torch.stack([a, b]), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            consistency.rows[state, 0], torch.stack([c_skip + c_out * a, c_out * b]), rtol=1e-12, atol=0
        )


def test_deterministic_trajectory_is_the_pipelines_own_ddim(model):
    backbone = backbone_of(model)
    family = backbone.family
    seeds = sample_seeds(3, Stream.DISTILL, 0, 2)
    got = guided_trajectories(
        backbone,
        DenoisingSchedule.from_scheduler(family.scheduler, 4),
        PROMPTS[:2],
        seeds,
        torch.zeros(2, dtype=torch.long),
        guidance_scale=5.0,
        batch_size=1,
    )
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float64, safety_checker=None)
    noise = philox_normal(derive_seeds(Stream.INITIAL, ids=seeds), family.latent_shape, dtype=torch.float64)
    expected = pipeline(
        PROMPTS[:2],
        num_inference_steps=4,
        guidance_scale=5.0,
        eta=0.0,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(got.states[:, 0], noise, rtol=0, atol=0)
    # The schedulers' float32 tables limit what diffusers computes in float64.
    torch.testing.assert_close(got.x0, expected, rtol=1e-5, atol=1e-5)


def test_states_before_the_branch_are_the_samplers(model):
    backbone = backbone_of(model)
    schedule = DenoisingSchedule.from_scheduler(backbone.family.scheduler, 4, trainable_ratio=1e9)
    seeds = sample_seeds(0, Stream.DISTILL, 0, 3)
    sampler = Sampler(backbone, schedule, guidance_scale=5.0, batch_size=3)
    expected = sampler.sample(PROMPTS, seeds, role="reference", keep="trainable").states
    got = guided_trajectories(
        backbone, schedule, PROMPTS, seeds, torch.tensor([0, 2, 3]), guidance_scale=5.0, batch_size=2
    )
    assert schedule.trainable.tolist() == [True] * 4
    torch.testing.assert_close(got.states[2], expected[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(got.states[1, :3], expected[1, :3], rtol=0, atol=1e-12)
    assert (got.states[1, 3] - expected[1, 3]).abs().mean() > 1e-2
    assert (got.states[0, 1] - expected[0, 1]).abs().mean() > 1e-2


def test_every_state_is_drawn_alike_and_none_before_its_branch(model):
    distiller = distiller_of(model, steps=400, lr=1e-12)
    drawn = []
    distiller._accumulate = lambda trajectories, rows, states: drawn.append((rows, states)) or 0.0
    branch = torch.tensor([0, 2, 3, 3])
    distiller.train(Trajectories(torch.zeros(4, 4, 1), torch.zeros(4, 1), branch, PROMPTS + PROMPTS[:1]))
    rows, states = (torch.cat(part) for part in zip(*drawn, strict=True))
    assert (branch[rows] <= states).all()
    counts = torch.bincount(states, minlength=4)
    assert ((counts - 400).abs() < 100).all()
    assert (torch.bincount(rows[states == 3], minlength=4) > 50).all()


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_from_it():
    assert pseudo_huber(torch.tensor([3e-4, -3e-4], dtype=torch.float64)).item() == pytest.approx(4.5e-7, rel=1e-4)
    assert pseudo_huber(torch.tensor([1e3, -1e3], dtype=torch.float64)).item() == pytest.approx(999.9, rel=1e-6)


def test_gradient_is_the_losss_own_and_does_not_depend_on_micro_batches(model):
    gradients = {}
    for size in (1, 4):
        distiller = distiller_of(model, micro_batch_size=size)
        with torch.no_grad():
            for i, parameter in enumerate(distiller.parameters):
                parameter.add_(0.01 * (i + 1))
        trajectories = distiller.sample()
        rows, states = torch.tensor([0, 2, 2, 5]), torch.tensor([3, 3, 3, 3])
        distiller._accumulate(trajectories, rows, states)
        gradients[size] = torch.cat([parameter.grad.flatten() for parameter in distiller.parameters])
        for parameter in distiller.parameters:
            parameter.grad = None

    family = distiller.backbone.family
    x, target = trajectories.states[rows, 3], trajectories.x0[rows]
    row = distiller.lookahead.rows[3, 0]
    with distiller.backbone.role("policy"):
        m = family.predict(
            family.network, x, torch.full((4,), 1.0), family.encode([trajectories.prompts[i] for i in rows])
        )
    ((row[0] * x + row[1] * m - target).square() + 0.01).sqrt().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in distiller.parameters])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(gradients[4], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[1], expected, rtol=1e-9, atol=1e-12)


def test_distillation_makes_the_lora_foresee(model):
    family = load_family(str(model), device=CPU, dtype=torch.float32)
    # A network that predicts x_0 itself bends its trajectories most.
    family.scheduler.register_to_config(prediction_type="sample")
    settings = {
        **SMALL,
        "num_inference_steps": 3,
        "num_trajectories": 32,
        "rank": 4,
        "target_modules": ["to_v", "conv1", "conv2"],
        "steps": 30,
        "lr": 1e-2,
        "batch_size": 8,
        "micro_batch_size": 8,
        "evaluation_trajectories": 16,
    }
    distiller = Distiller(family, PROMPTS, make_distillation(settings=settings))
    before, tweedie = distiller.measure()[-2:]
    distiller.train(distiller.sample())
    after, tweedie_after = distiller.measure()[-2:]
    assert (before.lookahead, tweedie.lookahead) == ("consistency", "tweedie")
    assert tweedie_after == tweedie
    assert after.error < 0.75 * min(before.error, tweedie.error)


def test_output_is_the_measured_lora_in_half_precision(model, tmp_path):
    summary = run(model, tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in weights.values()) == summary["lora_parameters"]
    assert json.loads((tmp_path / "lora" / "distillation.json").read_text()) == summary

    backbone = backbone_of(model, torch.float32, consistency_lora=str(tmp_path / "lora"))
    again = measure_accuracy(
        backbone,
        DenoisingSchedule.from_scheduler(backbone.family.scheduler, 4),
        [*PROMPTS, PROMPTS[0]],
        sample_seeds(0, Stream.DISTILL, 3, 4),
        [1, 2, 3],
        role="consistency",
        guidance_scale=5.0,
        batch_size=8,
    )
    for got, expected in zip(again, summary["accuracy"], strict=True):
        assert (got.lookahead, got.timestep) == (expected["lookahead"], expected["timestep"])
        assert got.error == pytest.approx(expected["error"], rel=1e-3)
        assert got.sharpness == pytest.approx(expected["sharpness"], rel=1e-3)


def test_plain_diffusers_loads_what_the_backbone_loads(model, tmp_path):
    run(model, tmp_path / "lora", lr=0.05)
    backbone = backbone_of(model, torch.float32, consistency_lora=str(tmp_path / "lora"))
    x, t = torch.randn(2, *backbone.family.latent_shape), torch.tensor([601.0, 1.0])
    conditioning = backbone.family.encode(PROMPTS[:2])
    with torch.no_grad(), backbone.role("consistency"):
        ours = backbone.predict(x, t, conditioning)
    with torch.no_grad(), backbone.role("reference"):
        assert (backbone.predict(x, t, conditioning) - ours).abs().mean() > 1e-3
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        theirs = pipeline.unet(x, t, conditioning.tensors["encoder_hidden_states"]).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_same_seed_same_weights_other_seed_other_weights(model, tmp_path):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(model, tmp_path / name, seed=seed)
        weights[name] = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
    assert len(weights["a"]) == len(weights["b"]) > 0
    assert all(torch.equal(tensor, weights["b"][name]) for name, tensor in weights["a"].items())
    assert all(not torch.equal(tensor, weights["c"][name]) for name, tensor in weights["a"].items())


def test_reward_is_correlated_and_progress_reported(model, tmp_path):
    told = []
    summary = distill(
        str(model),
        PROMPTS,
        tmp_path / "lora",
        make_distillation(settings=SMALL),
        device=CPU,
        dtype=torch.float32,
        reward=lambda images, prompts: images.mean(dim=(1, 2, 3)),
        progress=lambda stage, done, total, figures: told.append((stage, done, total, figures)),
    )
    assert all(0.5 < row["correlation"] <= 1 for row in summary["accuracy"])
    training = [(done, total) for stage, done, total, _ in told if stage == "training"]
    assert training == [(1, 3), (2, 3), (3, 3)]
    assert [figures["loss"] > 0 for stage, _, _, figures in told if stage == "training"] == [True] * 3
    assert max(done for stage, done, _, _ in told if stage == "trajectories") == 4
    assert {total for stage, _, total, _ in told if stage == "evaluation"} == {12}


def test_table_shows_every_row():
    text = accuracy_table(
        [asdict(Accuracy("consistency", 901.0, 0.1234, 0.9, None)), asdict(Accuracy("tweedie", 1.0, 2, 1, 0.5))]
    )
    assert text.splitlines()[1].split() == ["consistency", "901", "0.123", "0.900", "-"]
    assert text.splitlines()[2].split() == ["tweedie", "1", "2.000", "1.000", "0.500"]


def test_existing_output_is_refused_untouched(model, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"output .*lora exists; choose another folder"):
        run(model, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_distillation_that_fails(model, tmp_path):
    with pytest.raises(UserError, match=r"the loss became .* at step \d; lower lr \(it is 1e\+30\)"):
        run(model, tmp_path / "lora", lr=1e30)
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(model, tmp_path / "file" / "lora")


@pytest.mark.parametrize(
    ("prompts", "dtype", "message"),
    [
        ([], torch.float32, "distillation without prompts"),
        (PROMPTS, torch.float16, "distillation in float16"),
    ],
)
def test_what_cannot_be_distilled_is_refused(model, tmp_path, prompts, dtype, message):
    with pytest.raises(UserError, match=message):
        distill(str(model), prompts, tmp_path / "lora", make_distillation(), device=CPU, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_shipped_lora_foresees_the_shipped_model():
    """The LoRA and the pipeline of the embedded world belong together: retraining one alone shows here."""
    folder = shapes.consistency_lora_folder()
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_size <= 1_300_000
    family = load_family("shapes", device=CPU, dtype=torch.float32)
    consistency, tweedie = measure_accuracy(
        Backbone(family, rank=1, consistency_lora=str(folder)),
        DenoisingSchedule.from_scheduler(family.scheduler, 20),
        shapes.TRAIN_PROMPTS[::13],
        sample_seeds(12, Stream.DISTILL, 0, len(shapes.TRAIN_PROMPTS[::13])),
        [1],
        role="consistency",
        guidance_scale=4.0,
        batch_size=16,
        reward=load_reward("taste"),
    )
    assert consistency.error < 0.3
    assert consistency.error < 0.5 * tweedie.error
    assert consistency.correlation > tweedie.correlation
