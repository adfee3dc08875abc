from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from plan.conftest import allocated_peak
from safetensors.torch import load_file
from support.fake_gpu import CUDA, Cuda, fake_cuda, fake_nvml
from support.marks import slow
from support.stopping import stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sqdf_fast.algorithms.sqdf import Sqdf
from sqdf_fast.backbone import Backbone
from sqdf_fast.cli import main
from sqdf_fast.commands.sample import draw
from sqdf_fast.config import Config, make_config
from sqdf_fast.display import TrainingProgress
from sqdf_fast.engine import Executor, optimizers
from sqdf_fast.engine.meters import StageMeter
from sqdf_fast.engine.optimizers import allocate_states, clip_grad_norm
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.families.stable_diffusion import StableDiffusion
from sqdf_fast.kernels.denoise_step import native as denoise_step_native
from sqdf_fast.plan import Plan, Planner
from sqdf_fast.plan.device import CONTEXT_BYTES, GIB
from sqdf_fast.runs import read_metrics
from sqdf_fast.runs.checkpoint import read_checkpoint
from sqdf_fast.training import evaluator, lifecycle, trainer
from sqdf_fast.training.lifecycle import continue_run, new_run

REWARDS = """
import os
import signal
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

calls = 0

def nan_later(images, prompts):
    global calls
    calls += 1
    return images.mean(dim=(1, 2, 3)) * (float("nan") if calls > 12 else 1.0)

def ctrl_c_later(images, prompts):
    global calls
    calls += 1
    if calls == 12:
        os.kill(os.getpid(), signal.SIGINT)
    return brightness(images, prompts)

def wrong_shape(images, prompts):
    return images.mean()

def detached(images, prompts):
    return images.detach().mean(dim=(1, 2, 3))

def flat(images, prompts):
    return images.mean(dim=(1, 2, 3)) * 0

def negative(images, prompts):
    return images.mean(dim=(1, 2, 3)) - 10

def infinite_gradient(images, prompts):
    return (images.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3)).detach()).sqrt()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na ring\n")
    return tmp_path


def config(model: Path, **changes):
    settings = {
        "model": str(model),
        "reward": "my_rewards:brightness",
        "prompts": "prompts.txt",
        "steps": 5,
        "checkpoint_every": 2,
        "sampling": {"num_inference_steps": 4, "guidance_scale": 2.0, "batch_size": 4},
        "objective": {"lookahead": "tweedie", "alpha": 0.01},
        "optimizer": {"batch_size": 4, "lr": 1e-2},
        "execution": {"executor": "joint", "micro_batch": 2},
        "replay": {"capacity": 8, "refill": 4, "steps_per_refill": 2},
        "evaluation": {"every": 4, "num_prompts": 2, "images_per_prompt": 2, "grid": 3},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(file=settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[[Config], Path]:
    """The folder of a finished run of a configuration: made once, never written to again."""
    runs: dict[str, Path] = {}

    def run_of(config: Config) -> Path:
        key = config.model_dump_json()
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("finished") / "run"
            new_run(config, runs[key])
        return runs[key]

    return run_of


def lora(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_run_folder_is_complete(model, folder):
    run = folder / "run"
    summary = new_run(config(model), run)
    assert "proxy reward" in summary
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in evaluations] == [0, 4, 5]
    expected = {"reward_mean", "reward_std", "kl_mean", "loss", "grad_norm", "seconds", "unet_evaluations"}
    assert all(expected <= line.keys() for line in steps)
    assert all("eval_proxy_reward" in line and "eval_diversity" in line for line in evaluations)
    assert {line["better"]["distance_to_base"] for line in evaluations} == {"lower"}
    assert steps[0]["kl_mean"] == 0
    assert steps[-1]["kl_mean"] > 0
    # A refill is 4 trajectories of 4 guided steps; a step runs policy and reference guided on 4 states.
    assert 4 * 4 * 2 + 4 * 4 <= steps[0]["unet_evaluations"] <= 4 * 4 * 2 + 4 * 6
    assert 4 * 4 <= steps[1]["unet_evaluations"] <= 4 * 6
    assert sorted(os.listdir(run / "samples" / "step_000005")) == ["00.png", "01.png", "02.png"]
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert make_config(file=__import__("yaml").safe_load((run / "config.yaml").read_text())) == config(model)


def test_the_lora_loads_into_a_plain_pipeline_and_changes_it(model, finished):
    run = finished(config(model))
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 8, 16)
    before = pipeline.unet(x, t, states).sample
    pipeline.load_lora_weights(run / "lora")
    after = pipeline.unet(x, t, states).sample
    assert not torch.allclose(before, after)
    pipeline.unload_lora_weights()
    assert torch.allclose(pipeline.unet(x, t, states).sample, before)


def test_a_limit_ends_the_run_and_spreads_its_evaluations(model, folder, finished):
    free = finished(config(model))
    each = [line["unet_evaluations"] for line in read_metrics(free / "metrics.jsonl") if "loss" in line]
    # Reached by the third step.
    limits = {"unet_evaluations": sum(each[:3]) - 1}
    changes = {"steps": 100, "limits": limits, "evaluation": {"points": 2}}
    new_run(config(model, **changes), folder / "limited")
    lines = read_metrics(folder / "limited" / "metrics.jsonl")
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluated] == [0, 3]
    assert evaluated[0]["eval_kl"] == 0 < evaluated[1]["eval_kl"]
    assert (lines[-1]["kind"], lines[-1]["reason"]) == ("end", "limit")
    assert lines[-1]["spent_unet_evaluations"] == evaluated[1]["spent_unet_evaluations"] == sum(each[:3])
    # A run that is stopped and resumed ends at the same place.
    with pytest.raises(Interrupted):
        new_run(config(model, **changes), folder / "parts", stop_after(13))
    continue_run(folder / "parts")
    assert same(lora(folder / "limited"), lora(folder / "parts"))


def test_the_reward_rises_and_the_kl_holds_it(model, folder):
    changes = {"steps": 18, "optimizer": {"lr": 3e-2, "batch_size": 8}, "execution": {"micro_batch": 8}}
    new_run(config(model, **changes, objective={"alpha": 0.0}), folder / "free")
    new_run(config(model, **changes, objective={"alpha": 10.0}), folder / "held")

    def gain(name: str) -> float:
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if line["kind"] == "evaluation"]
        return lines[-1]["eval_proxy_reward"] - lines[0]["eval_proxy_reward"]

    assert gain("free") > 0.01
    assert abs(gain("held")) < 0.1 * gain("free")


@pytest.mark.slow
def test_the_fused_ops_train_by_default_and_train_the_same_model(model, folder, monkeypatch):
    """impl decides how the arithmetic is done, never what is computed: float32 rounding apart, the LoRA is the same."""
    calls = []
    forward = denoise_step_native.forward
    monkeypatch.setattr(denoise_step_native, "forward", lambda *a: calls.append(1) or forward(*a))
    loras = {}
    for impl in ("auto", "native", "reference"):
        before = len(calls)
        new_run(config(model, impl=impl, steps=3), folder / impl)
        assert (len(calls) > before) == (impl != "reference")
        loras[impl] = lora(folder / impl)
    assert same(loras["auto"], loras["native"])
    assert not same(loras["native"], loras["reference"])
    trained = [key for key in loras["native"] if "lora_B" in key]  # these start at zero: what is in them was learnt
    for key in trained:
        error = (loras["native"][key] - loras["reference"][key]).norm() / loras["reference"][key].norm()
        assert error < 1e-4


@pytest.mark.parametrize("mode", ["uniform", slow("prioritised"), slow("on-policy")])
def test_same_seed_same_run_bit_for_bit(model, folder, finished, mode):
    one = finished(config(model, replay={"mode": mode}))
    for name, seed in (("same", 0), ("other", 4)):
        new_run(config(model, replay={"mode": mode}, seed=seed), folder / name)
    assert same(lora(one), lora(folder / "same"))
    assert not same(lora(one), lora(folder / "other"))


@pytest.mark.parametrize("calls", [slow(5), 13, slow(24), 30, slow(35)])
def test_stopped_and_resumed_equals_uninterrupted(model, folder, finished, calls):
    whole = finished(config(model, replay={"mode": "prioritised"}))
    with pytest.raises(Interrupted) as stop:
        new_run(config(model, replay={"mode": "prioritised"}), folder / "parts", stop_after(calls))
    assert str(stop.value) == str(folder / "parts")
    continue_run(folder / "parts")
    assert same(lora(whole), lora(folder / "parts"))
    untimed = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "spent_seconds", "stages", "memory_bytes")}
            for line in lines
        ]
        for lines in (read_metrics(run / "metrics.jsonl") for run in (whole, folder / "parts"))
    ]
    assert untimed[0] == untimed[1]


def test_stopped_during_the_checks_nothing_is_written(model, folder):
    with pytest.raises(Interrupted) as stop:
        new_run(config(model), folder / "run", stop_after(2))
    assert str(stop.value) == ""
    assert not (folder / "run").exists()


def test_killed_before_the_first_checkpoint_it_starts_again_and_logs_once(model, folder, finished):
    whole = finished(config(model))
    shutil.copytree(whole, folder / "killed")
    shutil.rmtree(folder / "killed" / "checkpoints")
    continue_run(folder / "killed")
    assert same(lora(whole), lora(folder / "killed"))
    kinds = [
        [(line["kind"], line["step"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, folder / "killed")
    ]
    assert kinds[0] == kinds[1]


def test_a_killed_run_continues_from_its_last_checkpoint(model, folder, finished):
    whole = finished(config(model))
    shutil.copytree(whole, folder / "killed")
    # As if killed after step 4's checkpoint: later checkpoints and the LoRA are not there, the log is longer.
    (folder / "killed" / "checkpoints" / "step_000005").rename(folder / "gone")
    continue_run(folder / "killed")
    assert same(lora(whole), lora(folder / "killed"))
    steps = [line["step"] for line in read_metrics(folder / "killed" / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5]


def endless(model: Path, reward: str) -> list[str]:
    """Arguments of a run that only an interruption ends."""
    settings = (
        *("objective.lookahead=tweedie", "sampling.num_inference_steps=4", "optimizer.batch_size=2"),
        *("replay.refill=2", "evaluation.num_prompts=1", "evaluation.images_per_prompt=2"),
    )
    return [
        *("train", "--model", str(model), "--reward", f"my_rewards:{reward}", "--prompts", "prompts.txt"),
        *("--output", "run", "--steps", "100000"),
        *(argument for setting in settings for argument in ("--set", setting)),
    ]


def assert_interrupted_after(steps: int, status: int, said: str) -> None:
    assert status == 130
    assert "Continue with: sqdf-fast train --resume run" in said
    (found,) = Path("run", "checkpoints").glob("step_*")
    assert read_checkpoint(found)[1]["step"] >= steps
    assert Path("run", "report.html").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(model, folder, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main(endless(model, "ctrl_c_later"))
    assert_interrupted_after(1, stop.value.code, capsys.readouterr().err)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_process_of_its_own_saves_on_ctrl_c(model, folder):
    command = [sys.executable, "-m", "sqdf_fast.cli", *endless(model, "brightness")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert_interrupted_after(3, process.returncode, said)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("wrong_shape", "shape"),
        ("detached", "detached"),
        ("flat", "zero at every pixel"),
        ("infinite_gradient", "gradient"),
    ],
)
def test_a_reward_that_is_none_is_refused_before_the_run_begins(model, folder, reward, said):
    with pytest.raises(UserError, match=said):
        new_run(config(model, reward=f"my_rewards:{reward}"), folder / "run")
    assert not (folder / "run").exists()


def test_nan_never_reaches_the_weights(model, folder):
    with pytest.raises(UserError, match="nan"):
        new_run(config(model, reward="my_rewards:nan_later", steps=50), folder / "run")
    for checkpoint in (folder / "run" / "checkpoints").glob("step_*"):
        tensors, _ = read_checkpoint(checkpoint)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    assert all(torch.isfinite(tensor).all() for tensor in lora(folder / "run").values())


def test_prioritised_without_a_positive_reward_trains_on(model, folder):
    new_run(config(model, reward="my_rewards:negative", replay={"mode": "prioritised"}), folder / "run")
    assert (folder / "run" / "lora").exists()


def test_a_mask_that_drops_every_sample_is_said(model, folder):
    with pytest.raises(UserError, match="mask_nonpositive=false"):
        new_run(config(model, reward="my_rewards:negative", objective={"mask_nonpositive": True}), folder / "run")


def test_run_folders_are_named_after_model_and_reward(model, folder):
    new_run(config(model, steps=1), None)
    assert (folder / "runs" / "tiny-my_rewards-brightness-001" / "report.html").exists()


STAGED = {"executor": "staged", "forward_batch_rows": 8, "backward_batch_rows": 4, "decode_images": 4}


def final(run: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(lora(run).items())])


def out_of_memory_once(monkeypatch, owner, name: str, counts=lambda *given: True) -> None:
    """``owner.name`` runs out of memory at the end of its second call among those that count."""
    whole, calls = getattr(owner, name), []

    def failing(*given, **options):
        result = whole(*given, **options)
        if counts(*given):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no room")
        return result

    monkeypatch.setattr(owner, name, failing)


def chunk_of_the_policy_vjp(backbone, rows) -> bool:
    return torch.is_grad_enabled() and not rows.x.requires_grad


STAGES = ("transition", "look-ahead", "reward", "look-ahead vjp", "policy vjp", "forward", "backward")
PLACES = {
    **{stage: (stage, Executor, "begin", lambda _, name, *needed, stage=stage: name == stage) for stage in STAGES},
    "policy vjp, second chunk": ("policy vjp", Backbone, "run", chunk_of_the_policy_vjp),
    "clipping": ("optimizer", trainer, "clip_grad_norm"),
    "states of the optimizer": ("optimizer", optimizers, "_fresh_state"),
}


FAST_PLACES = {"reward", "policy vjp, second chunk", "backward", "states of the optimizer"}


@pytest.mark.parametrize("place", [place if place in FAST_PLACES else slow(place) for place in PLACES])
def test_running_out_of_memory_loses_no_step_and_changes_no_result(model, folder, finished, monkeypatch, place):
    stage, *failing = PLACES[place]
    settings = {"steps": 3, "dtype": "float64"}
    if stage not in ("forward", "backward"):
        settings["execution"] = STAGED
    plain, squeezed = finished(config(model, **settings)), folder / "squeezed"
    out_of_memory_once(monkeypatch, *failing)
    new_run(config(model, **settings), squeezed)
    truth, found = final(plain), final(squeezed)
    assert (found - truth).norm() / truth.norm() < 1e-9
    one, two = (
        [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"] for run in (plain, squeezed)
    )
    assert [line["step"] for line in two] == [1, 2, 3]
    assert [line["reward_mean"] for line in two] == pytest.approx([line["reward_mean"] for line in one], rel=1e-9)
    (event,) = (line["budget_event"] for line in two if "budget_event" in line)
    assert f"out of memory in stage {stage!r}" in event


@pytest.mark.slow
@pytest.mark.parametrize(("called", "step"), [(allocate_states, 0), (clip_grad_norm, 1)], ids=["states", "clipping"])
def test_out_of_memory_before_every_update_saves_the_last_whole_step(
    model, folder, finished, monkeypatch, called, step
):
    calls = []

    def failing(*given):
        calls.append(1)
        if len(calls) > step:
            raise torch.OutOfMemoryError("no room")
        return called(*given)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, called.__name__, failing)
        with pytest.raises(UserError, match=r"'optimizer' of step .*optimizer\.states=cpu"):
            new_run(config(model, steps=2, dtype="float64"), folder / "run")
    assert [path.name for path in sorted((folder / "run" / "checkpoints").glob("step_*"))] == [f"step_{step:06d}"]
    continue_run(folder / "run")
    truth, found = final(finished(config(model, steps=2, dtype="float64"))), final(folder / "run")
    assert (found - truth).norm() / truth.norm() < 1e-9


def test_running_out_of_memory_while_sampling_halves_the_batch(model, folder, finished, monkeypatch):
    plain = finished(config(model, steps=1))
    walk = Sampler.walk

    def failing(self, prompts, *rest, **options):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return walk(self, prompts, *rest, **options)

    monkeypatch.setattr(Sampler, "walk", failing)
    new_run(config(model, steps=1), folder / "squeezed")
    truth, found = final(plain), final(folder / "squeezed")
    assert (found - truth).norm() / truth.norm() < 1e-4
    (step,) = (line for line in read_metrics(folder / "squeezed" / "metrics.jsonl") if line["kind"] == "step")
    assert "batch_size 4 -> 2" in step["budget_event"]


def test_running_out_of_memory_while_decoding_takes_fewer_pictures(model, folder, finished, monkeypatch):
    plain = finished(config(model, steps=1, execution=STAGED))
    decode = StableDiffusion.decode

    def failing(family, latents):
        if len(latents) > 1 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return decode(family, latents)

    monkeypatch.setattr(StableDiffusion, "decode", failing)
    new_run(config(model, steps=1, execution=STAGED), folder / "squeezed")
    truth, found = final(plain), final(folder / "squeezed")
    assert (found - truth).norm() / truth.norm() < 1e-4
    (step,) = (line for line in read_metrics(folder / "squeezed" / "metrics.jsonl") if line["kind"] == "step")
    assert "decode_images 2 -> 1" in step["budget_event"]


def test_out_of_memory_before_the_first_step_is_one_line(model, folder, monkeypatch):
    def preflight(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(lifecycle, "preflight", preflight)
    with pytest.raises(UserError, match="before the first step"):
        new_run(config(model), folder / "run")
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_out_of_memory_in_the_judges_saves_the_state(model, folder, finished, monkeypatch):
    whole = finished(config(model))
    evaluate, calls = evaluator.evaluate_images, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluator, "evaluate_images", failing)
    with pytest.raises(UserError, match="state is saved"):
        new_run(config(model), folder / "run")
    continue_run(folder / "run")
    assert same(lora(folder / "run"), lora(whole))


def test_out_of_memory_with_nothing_left_is_one_line(model, folder, monkeypatch):
    def begin(self, name, *needed):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Executor, "begin", begin)
    with pytest.raises(UserError, match="smallest settings"):
        new_run(config(model), folder / "run")


@pytest.mark.parametrize(
    "execution", [STAGED, {**STAGED, "gradient_checkpointing": ["network", "decoder"], "offload": "staged"}]
)
def test_executors_train_the_same_lora(model, finished, execution):
    truth, found = (
        final(finished(config(model, dtype="float64", steps=3, **changes)))
        for changes in ({}, {"execution": execution})
    )
    assert (found - truth).norm() / truth.norm() < 1e-9


def test_memory_is_known_within_the_first_step(model, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        TrainingProgress, "phase", lambda self, *phase: seen.append((self.step, phase[0], self.memory()))
    )
    monkeypatch.setattr(StageMeter, "live_bytes", 3)
    monkeypatch.setattr(StageMeter, "peak_bytes", 5)
    new_run(config(model, steps=1), folder / "run")
    assert {(0, "sampling", (3, 5)), (0, "training", (3, 5))} <= set(seen)
    (step,) = (line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == "step")
    assert step["memory_bytes"] == 5


PLANNED = {"execution.executor": "staged", "execution.backward_batch_rows": 1}


@pytest.fixture
def held(monkeypatch) -> Cuda:
    """A GPU of 24 GiB, one of them used by others. Runs on it are planned, capped, begun and do nothing.

    Its ``asked`` are budget and card of every plan, its ``begun`` configuration and planned bytes of every run.
    """
    cuda, nvml = fake_cuda(monkeypatch), fake_nvml(monkeypatch)
    cuda.nvml, cuda.asked, cuda.begun = nvml, [], []
    nvml.used, nvml.computing = 4 * GIB, [(os.getpid(), 3 * GIB), (-7, GIB)]

    def plan(config, vram, *, device_name, **options):
        cuda.asked.append((vram, device_name))
        numbers = {"vram_gib": vram / GIB, "peak_gib": 14.0, "reserve_gib": 2.0}
        return Plan(True, config.model, device_name, *numbers.values(), "staged", 1, PLANNED, (), 1.0, 1.0)

    def assemble(config, run, stop, progress):
        cuda.begun.append((config, progress.planned_bytes))
        return SimpleNamespace(resume=lambda: None)

    monkeypatch.setattr(lifecycle, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(lifecycle, "make_plan", plan)
    monkeypatch.setattr(lifecycle, "_assemble", assemble)
    monkeypatch.setattr(lifecycle, "check", lambda trainer: None)
    monkeypatch.setattr(lifecycle, "_finish", lambda trainer: "done")
    return cuda


@pytest.mark.parametrize(("vram", "budget", "allowed"), [("24G", 24, 23), ("80%", 19.2, 19.2), ("18G", 18, 18)])
def test_a_run_and_its_continuation_are_held_to_their_budget(model, folder, held, capsys, vram, budget, allowed):
    run = folder / "run"
    new_run(config(model, vram=vram, dtype="bfloat16"), run)
    assert held.asked == [(int(budget * GIB), "NVIDIA GeForce RTX 4090")]
    # The share of the whole card that is left to the allocator: without what others use and without the context.
    fraction = (allowed - CONTEXT_BYTES / GIB) / 24
    assert held.fractions == [pytest.approx(fraction, rel=1e-9)]
    (begun,) = held.begun
    assert (begun[0].execution.executor, begun[0].execution.backward_batch_rows) == ("staged", 1)
    assert begun[1] == 14 * GIB
    said = "cuda:0: 10.0 of 24.0 GiB free; 1 other process uses 1.0 GiB"
    assert said in capsys.readouterr().err
    continue_run(run)
    assert len(held.asked) == 1
    assert held.fractions == [pytest.approx(fraction, rel=1e-9)] * 2
    assert held.begun[1] == begun
    assert said in capsys.readouterr().err


def test_a_run_that_others_leave_no_room_is_refused_again_and_again(model, folder, held):
    run = folder / "run"
    new_run(config(model, vram="24G", dtype="bfloat16"), run)
    held.nvml.used, held.nvml.computing = 13 * GIB, [(os.getpid(), 3 * GIB), (-7, 10 * GIB)]
    for again in (
        lambda: continue_run(run),
        lambda: new_run(config(model, vram="24G", dtype="bfloat16"), folder / "other"),
    ):
        with pytest.raises(UserError, match=r"16\.0 GiB of cuda:0 are not available: 1 other process uses 10\.0"):
            again()
    assert len(held.begun) == 1


def test_without_a_budget_a_run_is_not_capped(model, folder, held):
    new_run(config(model), folder / "run")
    assert (held.asked, held.fractions, held.begun[0][1]) == ([], [], None)


@pytest.mark.slow
def test_half_the_joint_peak_is_enough_and_gives_the_same_weights(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    joint = {"executor": "joint", "micro_batch": 8, "gradient_checkpointing": []}
    settings = {
        "dtype": "float64",
        "device": "cpu",
        "steps": 3,
        "sampling": {"num_inference_steps": 4, "batch_size": 8},
        "optimizer": {"batch_size": 8},
        "replay": {"capacity": 8, "refill": 8, "steps_per_refill": 3},
        "evaluation": {"every": 0, "num_prompts": 2, "images_per_prompt": 2},
        "execution": joint,
    }
    plain = make_config("shapes", assignments=settings)
    planner = Planner(plain, use_cache=False, on_cpu=True)
    peak = planner.simulation().run(plain.execution, 8).peak_bytes
    budget = f"{peak / 2 / 2**20:.3f}M"
    new_run(plain, folder / "joint")
    real = []
    accumulate = Sqdf.accumulate

    def measured(sqdf, step):
        # The profiler does not know what was there before it began.
        modules = [module for part in sqdf.runtime.groups._modules.values() for module in part]
        before = sum(t.untyped_storage().nbytes() for m in modules for t in (*m.parameters(), *m.buffers()))
        results = []
        real.append(before + allocated_peak(lambda: results.append(accumulate(sqdf, step))))
        return results[0]

    with monkeypatch.context() as patch:
        patch.setattr(Sqdf, "accumulate", measured)
        new_run(plain.model_copy(update={"vram": budget}), folder / "half")
    assert len(real) == 3
    assert peak / 4 < max(real) <= peak / 2
    truth, found = final(folder / "joint"), final(folder / "half")
    assert (found - truth).norm() / truth.norm() < 1e-9
    plan = json.loads((folder / "half" / "plan.json").read_text())
    assert plan["fits"]
    assert plan["device"] == "CPU"
    assert plan["reserve_gib"] == 0
    assert plan["peak_gib"] * 2**30 <= peak / 2
    assert "planned" in (folder / "half" / "report.html").read_text()
    with pytest.raises(UserError, match="does not fit"):
        new_run(plain.model_copy(update={"vram": "1M"}), folder / "none")
    assert not (folder / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_a_whole_network_is_trained_resumed_and_loaded(model, folder, dtype):
    settings = {
        "dtype": dtype,
        "policy": {"kind": "full"},
        "execution": STAGED,
        "optimizer": {"lr": 1e-3, "kind": "adamw8bit"},
        "steps": 4,
    }
    new_run(config(model, **settings), folder / "run")
    weights = load_file(folder / "run" / "network" / "diffusion_pytorch_model.safetensors")
    base = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == base.keys()
    moved = [not torch.equal(weights[key].float(), base[key].to(weights[key].dtype).float()) for key in base]
    assert sum(moved) > 0.9 * len(moved)
    with pytest.raises(Interrupted):
        new_run(config(model, **settings), folder / "again", stop_after(15))
    continue_run(folder / "again")
    again = load_file(folder / "again" / "network" / "diffusion_pytorch_model.safetensors")
    assert same(weights, again)
    draw(folder / "run", ["a red star"], number=1, seed=0, base=False, output=folder / "one.png")
    assert (folder / "one.png").stat().st_size > 0


@pytest.mark.slow
def test_a_buffer_of_x0_trains_and_resumes(model, folder):
    settings = {"replay": {"store": "x0"}, "steps": 4}
    new_run(config(model, **settings), folder / "run")
    new_run(config(model, steps=4), folder / "states")
    with pytest.raises(Interrupted):
        new_run(config(model, **settings), folder / "again", stop_after(25))
    continue_run(folder / "again")
    assert same(lora(folder / "run"), lora(folder / "again"))
    assert not same(lora(folder / "run"), lora(folder / "states"))
    kept = [
        read_checkpoint(folder / name / "checkpoints" / "step_000004")[0][f"algorithm.{store}"]
        for name, store in (("run", "x0"), ("states", "states"))
    ]
    assert kept[1].nbytes == kept[0].nbytes * kept[1].shape[1]


@pytest.mark.slow
def test_eight_bit_states_resume_bit_for_bit(model, folder):
    settings = {"policy": {"rank": 512}, "optimizer": {"kind": "adamw8bit"}, "steps": 4, "checkpoint_every": 1}
    new_run(config(model, **settings), folder / "run")
    state, _ = read_checkpoint(folder / "run" / "checkpoints" / "step_000004")
    assert any(tensor.dtype == torch.uint8 for name, tensor in state.items() if name.startswith("optimizer."))
    with pytest.raises(Interrupted):
        new_run(config(model, **settings), folder / "again", stop_after(15))
    continue_run(folder / "again")
    assert same(lora(folder / "run"), lora(folder / "again"))


def test_an_existing_folder_is_left_alone(model, folder):
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists"):
        new_run(config(model), folder / "run")
    assert os.listdir(folder / "run") == ["mine.txt"]


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(model, folder, finished):
    shutil.copytree(finished(config(model)), folder / "run")
    newest = folder / "run" / "checkpoints" / "step_000005"
    (newest / "state.json").write_text("{")
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="step_000005 is damaged"):
        continue_run(folder / "run")
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_configuration_is_refused(model, folder, finished):
    shutil.copytree(finished(config(model)), folder / "run")
    settings = (folder / "run" / "config.yaml").read_text().replace("rank: 4", "rank: 2")
    (folder / "run" / "config.yaml").write_text(settings)
    with pytest.raises(UserError, match="does not belong"):
        continue_run(folder / "run")


def test_a_finished_run_resumed_changes_nothing(model, folder, finished):
    shutil.copytree(finished(config(model)), folder / "run")
    before, lines = lora(folder / "run"), json.dumps(read_metrics(folder / "run" / "metrics.jsonl"))
    continue_run(folder / "run")
    assert same(before, lora(folder / "run"))
    assert json.dumps(read_metrics(folder / "run" / "metrics.jsonl")) == lines


@pytest.mark.slow
def test_lookaheads_differ_and_all_train(model, folder, finished):
    for number, objective in enumerate(({"lookahead": "deterministic", "lookahead_steps": 2}, {"credit": "posterior"})):
        new_run(config(model, objective=objective), folder / f"run{number}")
    tweedie = finished(config(model))
    assert not same(lora(folder / "run0"), lora(tweedie))
    assert not same(lora(folder / "run1"), lora(tweedie))


def test_half_precision_base_keeps_a_float32_lora(model, folder):
    new_run(config(model, dtype="bfloat16", steps=2), folder / "run")
    assert {tensor.dtype for tensor in lora(folder / "run").values()} == {torch.float32}


def test_metrics_and_images_reach_tensorboard(model, folder):
    run = folder / "run"
    new_run(config(model, steps=2, logging={"trackers": ["tensorboard"]}), run)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    folders = {path.parent for path in run.rglob("events.out.tfevents.*")}
    (found,) = (log for log in (EventAccumulator(str(path)).Reload() for path in folders) if log.Tags()["scalars"])
    rewards = [(event.step, event.value) for event in found.Scalars("train/reward_mean")]
    assert rewards == [(line["step"], pytest.approx(line["reward_mean"], rel=1e-6)) for line in steps]
    assert [event.step for event in found.Scalars("evaluation/proxy_reward")] == [0, 2]
    assert len([tag for tag in found.Tags()["images"] if tag.startswith("samples/")]) == 3
