from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from support.direct_reward import BATCH, GUIDANCE, STEPS, Published, apart, gradient, make, settings
from support.marks import slow
from support.stopping import StopWhen

from sqdf_fast.cli import main
from sqdf_fast.config import Execution, Objective
from sqdf_fast.engine.joint import JointExecutor
from sqdf_fast.engine.noise import Stream
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import Interrupted, UserError
from sqdf_fast.kernels.philox import derive_seeds
from sqdf_fast.replay import ReplayBatch
from sqdf_fast.runs import read_metrics
from sqdf_fast.training.lifecycle import continue_run, new_run

REWARDS = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""
ALL = ["draft", "draft-kl", "draft-lv", "refl"]
SETTINGS = {"truncation": 3, "noises": 2, "window": 0.75}


@pytest.fixture(scope="module")
def clean_end(model, tmp_path_factory) -> Path:
    """The same model with a schedule whose last step adds no noise."""
    folder = tmp_path_factory.mktemp("model") / "clean"
    return with_scheduler(model, folder, timestep_spacing="trailing", set_alpha_to_one=True)


def with_scheduler(model: Path, folder: Path, **changes) -> Path:
    folder.mkdir()
    for part in model.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    DDIMScheduler.from_pretrained(model, subfolder="scheduler", **changes).save_pretrained(folder / "scheduler")
    return folder


def published(model: Path, algorithm, truncation: int, alpha: float) -> dict[str, torch.Tensor]:
    """-mean r(x_0) + alpha sum KL, by DDIMScheduler.step and autograd through the last steps."""
    truth = Published(model, algorithm)
    weights, scheduler = truth.weights(), truth.scheduler
    x, divergence = truth.state(STEPS - truncation), torch.zeros(BATCH, dtype=torch.float64)
    for i in range(STEPS - truncation, STEPS):
        t = scheduler.timesteps[i]
        eps = truth.predict(weights, x, t)
        if alpha and algorithm.schedule.trainable[i]:
            with torch.no_grad():
                reference = truth.predict(truth.base, x, t)
            means = [truth.step(x.detach(), output, i, 0.0).prev_sample for output in (eps, reference)]
            variance = scheduler._get_variance(int(t), int(t) - 1000 // STEPS)
            divergence = divergence + ((means[0] - means[1]) ** 2 / variance).flatten(1).mean(1)
        x = truth.step(x, eps, i, 1.0).prev_sample
    return truth.gradient((-truth.reward(x) + alpha * divergence).mean())


@pytest.mark.parametrize("truncation", [1, 2, STEPS])
def test_its_gradient_is_the_published_one(model, truncation):
    found = make(settings(model, "draft", own={"truncation": truncation}))
    assert apart(gradient(found), published(model, found, truncation, alpha=0.0)) < 1e-10


@pytest.mark.parametrize("truncation", [2, STEPS])
def test_its_gradient_with_a_kl_is_the_published_one(model, truncation):
    found = make(settings(model, "draft-kl", own={"truncation": truncation}))
    free = make(settings(model, "draft", own={"truncation": truncation}))
    held = gradient(found)
    assert apart(held, published(model, found, truncation, alpha=0.3)) < 1e-10
    assert apart(held, gradient(free)) > 1e-3


@pytest.mark.parametrize("algorithm", ["draft", "draft-kl"])
def test_a_last_step_without_noise_carries_the_gradient_and_no_kl(clean_end, algorithm):
    found = make(settings(clean_end, algorithm, own={"truncation": 2}))
    assert found.schedule.transition[-1, 2] == 0
    assert not found.schedule.trainable[-1]
    alpha = 0.3 if algorithm == "draft-kl" else 0.0
    assert apart(gradient(found), published(clean_end, found, 2, alpha)) < 1e-10


def test_the_result_is_of_the_pictures_that_the_sampler_draws(model):
    found = make(settings(model, "draft-kl", own={"truncation": 3}, execution={"micro_batch": 2}))
    found.collect(2)
    result = found.accumulate(2)
    prompts, seeds = found.draw_prompts(2, BATCH)
    rewards = found.runtime.rewards(found.runtime.sample(prompts, seeds).x0, prompts)
    assert torch.allclose(result.reward, rewards, rtol=1e-10)
    trainable = found.schedule.trainable[1:].nonzero().flatten() + 1
    assert result.index.sort().values.tolist() == trainable.repeat_interleave(BATCH).tolist()
    assert float(result.loss) == pytest.approx(float(-rewards.mean() + 0.3 * result.kl.sum() / BATCH), rel=1e-10)
    assert result.kl.min() > 0


def test_without_alpha_the_kl_is_measured_and_pulls_nowhere(model):
    free = gradient(make(settings(model, "draft", own=SETTINGS)))
    held = gradient(make(settings(model, "draft-kl", own=SETTINGS, objective={"alpha": 0.0})))
    assert apart(held, free) < 1e-12


def test_a_fresh_policy_has_no_kl(model):
    found = make(settings(model, "draft-kl", own=SETTINGS), stirred=False)
    found.collect(0)
    assert torch.equal(found.accumulate(0).kl, torch.zeros(BATCH * int(found.schedule.trainable[1:].sum())))


def test_with_one_step_it_is_sqdf_without_discount(model, tmp_path):
    """T = 1 and gamma = 1: x_{t-1} is x_0, and both losses are -r + alpha KL of the same transition."""
    folder = with_scheduler(model, tmp_path / "one", timestep_spacing="trailing")
    config = settings(folder, "draft-kl", sampling={"num_inference_steps": 1})
    one, two = make(config), make(config)
    prompts, seeds = one.draw_prompts(2, BATCH)
    x = two.runtime.sample(prompts, seeds, stop=0).x0
    sqdf = JointExecutor(
        two.backbone,
        two.schedule,
        two.runtime.score,
        Objective(lookahead="tweedie", alpha=0.3, gamma=1.0),
        guidance_scale=GUIDANCE,
        execution=Execution(executor="joint", micro_batch=BATCH),
    )
    index = torch.zeros(BATCH, dtype=torch.int64)
    sqdf.accumulate(ReplayBatch(x, index, prompts, torch.arange(BATCH)), derive_seeds(Stream.DENOISING, 0, ids=seeds))
    found = {name: parameter.grad for name, parameter in two.backbone.policy_parameters.items()}
    assert apart(gradient(one), found) < 1e-12


@pytest.mark.parametrize("algorithm", [slow("draft"), "draft-kl", "draft-lv", slow("refl")])
def test_micro_batches_and_recomputation_change_nothing(model, algorithm):
    truth = gradient(make(settings(model, algorithm, own=SETTINGS)))
    execution = {"micro_batch": 2, "gradient_checkpointing": ["network", "decoder"]}
    small = make(settings(model, algorithm, own=SETTINGS, execution=execution))
    assert apart(gradient(small), truth) < 1e-12
    assert small.backbone.checkpointed[0].count > 0


@pytest.mark.parametrize("algorithm", ALL)
def test_a_step_may_be_taken_again(model, algorithm):
    found = make(settings(model, algorithm, own=SETTINGS))
    once = gradient(found)
    found.accumulate(2)
    twice = {name: parameter.grad for name, parameter in found.backbone.policy_parameters.items()}
    assert apart(twice, {name: 2 * value for name, value in once.items()}) < 1e-12


@pytest.mark.parametrize(
    ("algorithm", "sampled", "pulled"), [("draft", 1, 3), ("draft-kl", 1, 3 + 3), ("draft-lv", 3, 1 + 2)]
)
def test_what_a_step_costs(model, algorithm, sampled, pulled):
    """Network rows: two halves of guidance a sample and step."""
    found = make(settings(model, algorithm, own=SETTINGS))
    untrainable = int((~found.schedule.trainable[1:]).sum()) if algorithm == "draft-kl" else 0
    found.collect(0)
    assert found.backbone.evaluations == 2 * BATCH * sampled
    found.accumulate(0)
    assert found.backbone.evaluations == 2 * BATCH * (sampled + pulled - untrainable)
    assert found.runtime.reward_evaluations == BATCH * (3 if algorithm == "draft-lv" else 1)


def test_more_steps_than_there_are_cannot_carry_a_gradient(model):
    with pytest.raises(UserError, match="allowed: 1 to 4"):
        make(settings(model, "draft", own={"truncation": 5}))


def test_a_kl_that_would_never_be_is_refused(clean_end):
    with pytest.raises(UserError, match=r"draft_kl\.truncation=2 or more"):
        make(settings(clean_end, "draft-kl"))
    make(settings(clean_end, "draft-kl", own={"truncation": 2}))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\na ring\n")
    return tmp_path


def whole_run(model: Path, algorithm: str, **changes):
    return settings(
        model,
        algorithm,
        reward="my_rewards:brightness",
        prompts="prompts.txt",
        steps=2,
        checkpoint_every=1,
        evaluation={"every": 0, "num_prompts": 1, "images_per_prompt": 2, "grid": 1},
        **{"own": SETTINGS, "optimizer": {"batch_size": 4, "lr": 1e-2}, **changes},
    )


def lora(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def stop_within_the_second_step(run: Path, questions: int) -> StopWhen:
    """Set after so many looks of step 2: network calls of sampling, batches scored."""
    asked = iter(range(10**9))

    def interrupted() -> bool:
        metrics = run / "metrics.jsonl"
        first_done = metrics.exists() and '"kind": "step"' in metrics.read_text()
        return first_done and next(asked) >= questions

    return StopWhen(interrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "questions"), [("draft-kl", 2), slow("refl", 0)])
def test_a_run_stopped_within_a_step_and_resumed_equals_the_whole_bit_for_bit(model, folder, algorithm, questions):
    config = whole_run(model, algorithm, dtype="float32")
    new_run(config, folder / "whole")
    with pytest.raises(Interrupted):
        new_run(config, folder / "parts", stop_within_the_second_step(folder / "parts", questions))
    steps = [line["step"] for line in read_metrics(folder / "parts" / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == [1]
    continue_run(folder / "parts")
    one, two = lora(folder / "whole"), lora(folder / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [line for line in read_metrics(folder / "parts" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in lines] == [1, 2]
    assert ("kl_mean" in lines[0]) == (algorithm == "draft-kl")


@pytest.mark.parametrize(("algorithm", "stage"), [("draft", "backward"), slow("draft-lv", "forward")])
def test_running_out_of_memory_loses_no_step_and_changes_no_result(model, folder, monkeypatch, algorithm, stage):
    config = whole_run(model, algorithm)
    new_run(config, folder / "plain")
    begin, seen = Runtime.begin, []

    def failing(self, name, *needed):
        begin(self, name, *needed)
        seen.append(name)
        if name == stage and seen.count(stage) == 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Runtime, "begin", failing)
    new_run(config, folder / "squeezed")
    assert apart(lora(folder / "squeezed"), lora(folder / "plain")) < 1e-6
    lines = [line for line in read_metrics(folder / "squeezed" / "metrics.jsonl") if line["kind"] == "step"]
    (event,) = (line["budget_event"] for line in lines if "budget_event" in line)
    assert f"out of memory in stage {stage!r}: micro_batch 5 -> 2" in event


def test_when_memory_never_suffices_the_ladder_ends_in_one_line(model, folder, monkeypatch):
    begin, given_up = Runtime.begin, []

    def failing(self, name, *needed):
        begin(self, name, *needed)
        if name == "forward":
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Runtime, "begin", failing)
    monkeypatch.setattr(Runtime, "_give_up", lambda self, what: given_up.append(what))
    with pytest.raises(UserError, match="smallest settings"):
        new_run(whole_run(model, "draft"), folder / "run")
    assert [what.split(": ")[1] for what in given_up] == [
        "micro_batch 5 -> 2",
        "micro_batch 2 -> 1",
        "gradient checkpointing of network and decoder and reward",
    ]


def test_a_run_from_the_command_line(model, folder):
    arguments = ["train", "--model", str(model), "--reward", "my_rewards:brightness", "--prompts", "prompts.txt"]
    values = ["algorithm=draft", "sampling.num_inference_steps=4", "steps=8"]
    values += ["optimizer.batch_size=4", "optimizer.lr=3e-2", "execution.micro_batch=4", "draft.truncation=2"]
    values += ["evaluation.num_prompts=2", "evaluation.images_per_prompt=2"]
    settings = [part for value in values for part in ("--set", value)]
    assert main([*arguments, "--output", "run", *settings]) == 0
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert lines[-1]["eval_proxy_reward"] > lines[0]["eval_proxy_reward"] + 0.005
