"""Plans: what they hold, how they are kept, and what they say when nothing fits. On the embedded world."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from pydantic import TypeAdapter

from sqdf_fast.config import make_config, with_settings
from sqdf_fast.display import format_duration
from sqdf_fast.errors import UserError
from sqdf_fast.plan import Plan, Planner, cache, find_device, make_plan, planner, reserve_bytes
from sqdf_fast.plan.device import CONTEXT_BYTES, FRAGMENTATION, GIB
from sqdf_fast.plan.search import Profile, choices, fastest
from sqdf_fast.plan.switches import SWITCHES

CONFIG = make_config("shapes")
CARD = find_device("RTX 4060", 8 * GIB)


@pytest.fixture(scope="module")
def shapes():
    return Planner(CONFIG, use_cache=False)


@pytest.fixture(scope="module")
def plan(shapes):
    return shapes.plan(2 * GIB, CARD)


@pytest.mark.slow
def test_a_plan_fits_with_its_reserve(plan):
    assert plan.fits
    assert plan.reserve_gib == reserve_bytes(2 * GIB) / GIB
    assert plan.peak_gib + plan.reserve_gib <= 2
    assert plan.peak_gib == pytest.approx(max(stage.live_gib for stage in plan.stages), abs=1e-3)
    assert plan.flops_per_step == sum(stage.flops for stage in plan.stages) > 0
    assert plan.predicted_seconds == pytest.approx(sum(stage.seconds for stage in plan.stages))


def test_its_settings_are_a_configurations(plan):
    config = with_settings(CONFIG, plan.settings)
    assert config.execution.executor == plan.executor
    assert config.sampling.batch_size == plan.settings["sampling.batch_size"]


def test_it_is_read_back_from_json(plan):
    assert Plan.from_json(plan.as_json()) == plan
    keys = {"fits", "peak_gib", "reserve_gib", "executor", "micro_batch", "settings", "stages"}
    values = json.loads(plan.as_json())
    assert keys | {"flops_per_step", "predicted_seconds"} <= values.keys()
    assert values["flops_per_step"] == plan.flops_per_step
    assert values["predicted_seconds"] == plan.predicted_seconds


def test_a_plan_stored_before_its_stages_were_renamed_is_read(plan):
    assert "sampled images" in [stage.name for stage in plan.stages]
    old = plan.as_json().replace('"sampled images"', '"sampled pictures"')
    assert Plan.from_json(old) == plan


def test_images_are_planned_as_they_are_decoded(plan):
    (decoded,) = (stage for stage in plan.stages if stage.name == "sampled images")
    assert plan.settings["execution.decode_images"] < plan.settings["sampling.batch_size"]
    assert decoded.note == f"{plan.settings['execution.decode_images']} images at once"


def test_the_table_has_a_line_a_stage_and_calls_the_time_a_model(plan):
    text = plan.as_text()
    for stage in plan.stages:
        row = next(line for line in text.splitlines() if line.startswith(stage.name + "  "))
        assert row.removeprefix(stage.name).split()[0] == f"{stage.live_gib:.2f}"
    assert "not a measurement" in text
    assert f"execution.executor={plan.executor}" in text


def test_a_smaller_budget_gets_a_smaller_and_slower_plan(shapes, plan):
    small = shapes.plan(int((CONTEXT_BYTES + 0.4 * plan.peak_gib * GIB) / (1 - FRAGMENTATION)), CARD)
    assert small.fits
    assert small.peak_gib < 0.4 * plan.peak_gib
    assert small.predicted_seconds > plan.predicted_seconds


def test_when_nothing_fits_it_says_by_how_much_and_what_would_help(shapes):
    budget = reserve_bytes(0)
    plan = shapes.plan(budget, CARD)
    assert not plan.fits
    assert "short by" in plan.advice
    assert "what would help" in plan.advice
    assert "does NOT fit" in plan.as_text()
    assert plan.peak_gib + plan.reserve_gib > budget / GIB


def test_every_switch_of_speed_has_a_reason(plan):
    assert [switch.key for switch in plan.switches] == list(SWITCHES)
    text = plan.as_text()
    for switch in plan.switches:
        assert f"{switch.key}={switch.value}: {switch.reason}" in text
        assert plan.settings.get(switch.key, CONFIG.replay.store) == switch.value
    assert plan.settings["sampling.compile"] == "none"
    assert plan.settings["sampling.channels_last"] is False


def test_the_replay_ratio_is_shown_and_never_set(plan):
    assert plan.replay_ratio == CONFIG.replay.steps_per_refill == 8
    assert not any(key.startswith("replay") for key in plan.settings)
    sampling = next(stage.seconds for stage in plan.stages if stage.name == "sampling")
    at_one = plan.predicted_seconds + 7 * sampling
    assert f"a step at 1: {format_duration(at_one)}" in plan.as_text()


def kept(shapes, **keep):
    keep = {key.replace("__", "."): value for key, value in keep.items()}
    return choices(shapes.profile("none"), CONFIG, CARD, keep), keep


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep",
    [
        {
            "execution__executor": "staged",
            "execution__backward_batch_rows": 3,
            "execution__gradient_checkpointing": ("decoder",),
        },
        {"execution__executor": "joint", "execution__micro_batch": 5},
        {"execution__offload": "staged", "sampling__batch_size": 7},
        {"sampling__merge_lora": False, "sampling__compile": "cuda-graphs", "sampling__channels_last": True},
    ],
)
def test_what_is_kept_is_in_every_choice(shapes, keep):
    found, keep = kept(shapes, **keep)
    assert found
    for choice in found:
        for key, value in keep.items():
            given = choice.settings[key]
            assert (tuple(given) if isinstance(given, list) else given) == value
        with_settings(CONFIG, choice.settings)
    assert len({str(choice.settings) for choice in found}) == len(found)


def test_a_kept_chunk_is_estimated_as_it_is(shapes):
    found, _ = kept(shapes, execution__executor="joint", execution__micro_batch=4, sampling__batch_size=4)
    free = [c for c in choices(shapes.profile("none"), CONFIG, CARD) if c.settings in [k.settings for k in found]]
    assert {str(c.settings): c.peaks for c in free} == {str(c.settings): c.peaks for c in found}


def test_contradictions_among_kept_settings_are_refused(shapes):
    keep = {"execution.executor": "joint", "execution.offload": "staged"}
    planner = Planner(CONFIG, use_cache=False, keep=keep)
    planner._profiles = shapes._profiles
    with pytest.raises(UserError, match=r"execution\.executor=joint, execution\.offload=staged"):
        planner.choices(CARD)


def test_what_is_kept_and_does_not_fit_is_named(shapes):
    planner = Planner(CONFIG, use_cache=False, keep={"execution.executor": "joint"})
    planner._profiles, planner._simulations = shapes._profiles, shapes._simulations
    plan = planner.plan(reserve_bytes(0), CARD)
    assert not plan.fits
    assert plan.executor == "joint"
    assert "leaving out execution.executor=joint" in plan.advice


def test_a_model_without_a_consistency_lora_is_refused_as_in_training():
    config = make_config("sd35", flags={"objective": {"lookahead": "consistency"}})
    with pytest.raises(UserError, match="no consistency LoRA of its own"):
        Planner(config).simulation()


def test_prompts_are_as_long_as_the_models_own_tokenizer_makes_them(shapes):
    assert shapes.simulation().family.clip_tokens == 8


def test_the_fastest_choice_of_a_profile_is_never_beaten(shapes):
    found = choices(shapes.profile("none"), CONFIG, CARD)
    limit = sorted(choice.peak_bytes for choice in found)[len(found) // 2]
    choice = fastest(found, limit)
    assert choice.peak_bytes <= limit
    assert choice.total_seconds <= 1.002 * min(c.total_seconds for c in found if c.peak_bytes <= limit)
    assert fastest(found, 0) is None


def test_a_profile_is_read_back(shapes):
    profile = shapes.profile("none")
    assert TypeAdapter(Profile).validate_json(json.dumps(asdict(profile))) == profile


def test_quantization_is_tried_only_where_it_is_allowed():
    assert Planner(CONFIG).quantizations == ["none"]
    assert Planner(CONFIG, ["nf4"]).quantizations == ["none", "nf4"]
    asked = with_settings(CONFIG, {"execution.quantization": "int8"})
    assert Planner(asked).quantizations == ["int8"]
    with pytest.raises(UserError, match="allowed: nf4, int8"):
        make_plan(CONFIG, GIB, allow=["fp2"])


def test_a_plan_is_kept_and_a_damaged_file_is_made_again(shapes, monkeypatch):
    made = []

    class Counting(Planner):
        def plan(self, *arguments):
            made.append(arguments)
            return shapes.plan(*arguments)

    monkeypatch.setattr(planner, "Planner", Counting)
    first = make_plan(CONFIG, 2 * GIB)
    assert make_plan(CONFIG, 2 * GIB) == first
    assert len(made) == 1
    (stored,) = cache.folder().glob("*.json")
    stored.write_text(stored.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert make_plan(CONFIG, 2 * GIB) == first
    assert len(made) == 2
    make_plan(CONFIG, GIB)
    assert len(made) == 3
