from __future__ import annotations

import re

import pytest
import yaml

from sqdf_fast.config import (
    ALGORITHM_SETTINGS,
    PRESETS,
    Config,
    default_preset,
    describe_settings,
    dump_config,
    given_settings,
    make_config,
    parse_assignments,
    read_config_file,
    section_of,
    setting_names,
    with_settings,
    without_effect,
)
from sqdf_fast.errors import UserError


def refused(*assignments: str) -> str:
    with pytest.raises(UserError) as error:
        make_config("shapes", assignments=parse_assignments(assignments))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("preset", "alpha", "gamma", "lr", "rank", "batch", "capacity"),
    [
        ("aesthetic", 2.0, 0.9, 1e-3, 4, 64, 1024),
        ("hpsv2", 0.05, 0.93, 5e-4, 32, 256, 4096),
        ("hpsv2-script", 0.005, 0.9, 2e-4, 32, 256, 4096),
        ("black-box", 1.0, 0.9, 1e-3, 4, 64, 1024),
    ],
)
def test_presets_are_the_papers(preset, alpha, gamma, lr, rank, batch, capacity):
    config = make_config(preset)
    found = (config.objective.alpha, config.objective.gamma, config.optimizer.lr, config.policy.rank)
    assert found == (alpha, gamma, lr, rank)
    assert (config.optimizer.batch_size, config.replay.capacity) == (batch, capacity)
    assert config.sampling.num_inference_steps == 50
    assert config.objective.mask_nonpositive


def test_black_box_differs_where_the_paper_differs():
    config = make_config("black-box")
    assert config.sampling.guidance_scale == 7.5
    assert (config.optimizer.weight_decay, config.optimizer.max_grad_norm) == (0.1, 5.0)


def test_later_layers_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: shapes\nsteps: 5\nobjective: {alpha: 1.0, gamma: 0.8}\n")
    config = make_config(
        file=read_config_file(file),
        assignments=parse_assignments(["objective.alpha=4", "optimizer.lr=2e-3", "policy.target_modules=[to_q]"]),
        flags={"steps": 7},
    )
    assert (config.steps, config.objective.alpha, config.objective.gamma) == (7, 4.0, 0.8)
    assert config.optimizer.lr == 2e-3
    assert config.policy.target_modules == ("to_q",)
    assert config.policy.rank == PRESETS["shapes"]["policy"]["rank"]


def test_a_dumped_configuration_reads_back(tmp_path):
    config = make_config("hpsv2", flags={"seed": 3})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert make_config(file=read_config_file(file)) == config


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("objective.alpha=-1", "objective.alpha = -1"),
        ("objective.gamma=0", "greater than 0"),
        ("objective.gamma=1.01", "less than or equal to 1"),
        ("sampling.eta=0", "sampling.eta = 0"),
        ("steps=0", "steps = 0"),
        ("sampling.num_inference_steps=0", "sampling.num_inference_steps"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("objective.gama=1", "did you mean 'objective.gamma'?"),
        ("gama=1", "did you mean 'objective.gamma'?"),
        ("optimiser.lr=1", "did you mean 'optimizer'?"),
        ("optimizer.warmup_steps=1", "unknown; allowed: optimizer.kind, optimizer.states, optimizer.lr"),
        ("replay.xyzzy=1", "allowed: replay.capacity, replay.mode"),
        ("replay.mode=latest", "'uniform', 'prioritised' or 'on-policy'"),
        ("replay.refill=65", "replay.capacity = 64"),
        ("reward_options.device=cpu", "reward_options.device"),
        ("steps", "key=value"),
        ("steps=[", "YAML"),
    ],
)
def test_bad_values_are_named_in_one_line(assignment, said):
    assert said in refused(assignment)


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="aesthetic, black-box, flux, hpsv2, hpsv2-script, sd35, sdxl, shapes"):
        make_config("esthetic")


@pytest.mark.parametrize("text", ["- a\n- b\n", "steps: [", "\xff"])
def test_files_that_are_no_configuration(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_config_file(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file(tmp_path / "absent.yaml")


def test_every_setting_is_described():
    text = describe_settings(Config)
    for name in setting_names(Config):
        assert f"  {name} " in text


def test_a_run_dumps_what_its_algorithm_reads_and_all_algorithms_together_everything():
    dumped = {
        name: set(yaml.safe_load(dump_config(make_config(flags={"algorithm": name})))) for name in ALGORITHM_SETTINGS
    }
    assert set.union(*dumped.values()) == {name.split(".")[0] for name in setting_names(Config)}
    own = {section_of(name) for name in ALGORITHM_SETTINGS}
    assert {name: sections & own for name, sections in dumped.items()} == {
        name: {section_of(name)} - {"sqdf"} for name in ALGORITHM_SETTINGS
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": {"kind": "full"}, "execution": {"quantization": "nf4"}}, "policy.kind=lora"),
        ({"execution": {"quantization": "int8", "offload": "staged"}}, "offload=none"),
        ({"sampling": {"compile": "cuda-graphs"}}, "merge_lora=false"),
        (
            {"sampling": {"compile": "cuda-graphs", "merge_lora": False}, "execution": {"offload": "staged"}},
            "none",
        ),
    ],
)
def test_combinations_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(file=changes)
    make_config(file={"sampling": {"compile": "cuda-graphs", "merge_lora": False}})


def test_options_of_a_part_of_a_sum_are_dotted():
    assignments = parse_assignments(["reward_options.clip.model=folder", "reward_options.quality=95"])
    assert make_config(assignments=assignments).reward_options == {"clip.model": "folder", "quality": 95}


def test_the_monitor_is_off_in_yaml_too():
    assert make_config(assignments=parse_assignments(["monitor.action=off"])).monitor.action == "off"
    assert "warn" in refused("monitor.action=true")


def test_what_the_user_set_is_known_and_a_whole_file_is_not_the_users():
    assignments = parse_assignments(["execution.micro_batch=4"])
    layers = {"seed": 3}, assignments, {"model": "sdxl"}
    assert given_settings(*layers) == ("seed", "execution.micro_batch", "model")
    whole = yaml.safe_load(dump_config(make_config("aesthetic", *layers)))
    assert given_settings(whole, assignments) == ("execution.micro_batch",)


@pytest.mark.parametrize(
    ("model", "preset"),
    [("shapes", "shapes"), ("sdxl", "sdxl"), ("black-forest-labs/FLUX.1-dev", "flux"), ("my/model", "aesthetic")],
)
def test_the_preset_of_a_model(model, preset):
    assert default_preset(model) == preset


@pytest.mark.parametrize(
    ("algorithm", "assignment", "reason"),
    [
        ("ddpo", "objective.gamma=0.8", "algorithm = ddpo (only with sqdf)"),
        ("ddpo", "objective.alpha=1", "(only with sqdf, draft-kl, dpok, awm)"),
        ("ddpo", "draft.truncation=2", "(only with draft)"),
        ("ddpo", "dpok.clip_range=1", "(only with dpok)"),
        ("ddpo", "replay.mode=prioritised", "(only with sqdf)"),
        ("ddpo", "execution.executor=staged", "(only with sqdf)"),
        ("sqdf", "ddpo.clip_range=1", "algorithm = sqdf (only with ddpo)"),
        ("draft", "replay.refill=4", "(only with sqdf, ddpo, dpok, awm)"),
        ("draft", "objective.lookahead=tweedie", "(only with sqdf)"),
        ("draft-lv", "objective.mask_nonpositive=true", "(only with sqdf)"),
        ("sqdf", "objective.lookahead_steps=4", "objective.lookahead = consistency (only with deterministic)"),
    ],
)
def test_a_setting_without_effect_is_refused_in_one_line(algorithm, assignment, reason):
    key, value = assignment.split("=")
    said = refused(f"algorithm={algorithm}", assignment)
    assert said.startswith(f"setting {key} has no effect with ")
    assert reason in said
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        make_config("shapes", file={"algorithm": algorithm, **parse_assignments([assignment])})
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        with_settings(make_config("shapes"), {"algorithm": algorithm, key: yaml.safe_load(value)})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": {"lookahead": "tweedie", "consistency_grid": 50}}, "objective.consistency_grid"),
        ({"policy": {"kind": "full", "rank": 8}}, "policy.rank"),
        ({"policy": {"base": "consistency"}, "sampling": {"guidance_scale": 1.0, "eta": 0.5}}, "sampling.eta"),
    ],
)
def test_a_setting_that_another_one_makes_idle_is_refused(settings, said):
    with pytest.raises(UserError, match=f"^setting {re.escape(said)} has no effect with [^\n]* \\(only with"):
        make_config("shapes", file=settings)


@pytest.mark.parametrize("algorithm", ALGORITHM_SETTINGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_serve_every_algorithm_and_what_a_run_wrote_always_loads(preset, algorithm, tmp_path):
    config = make_config(preset, flags={"algorithm": algorithm})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    written = read_config_file(tmp_path / "config.yaml")
    assert make_config(file=written) == config
    # As a file for another algorithm it is a run's all the same: what that one does not read is left behind.
    for other in ALGORITHM_SETTINGS:
        assert make_config(file=written, assignments={"algorithm": other}).algorithm == other


def test_no_consistency_model_is_loaded_for_algorithms_that_do_not_look_ahead():
    found = {name: make_config("shapes", flags={"algorithm": name}).objective.lookahead for name in ALGORITHM_SETTINGS}
    assert found == {name: "consistency" if name == "sqdf" else "tweedie" for name in ALGORITHM_SETTINGS}
    few_steps = {"policy": {"base": "consistency"}, "algorithm": "draft"}
    assert make_config("shapes", flags=few_steps).objective.lookahead == "consistency"


def test_what_several_algorithms_share_is_kept_for_each_of_them():
    shared = with_settings(make_config("shapes"), {"ddpo.timesteps": 5, "objective.gamma": 0.8}, shared=True)
    assert with_settings(shared, {"algorithm": "ddpo"}).ddpo.timesteps == 5
    assert with_settings(shared, {"algorithm": "sqdf"}).objective.gamma == 0.8
    assert "ddpo.timesteps" in without_effect(shared)


def test_numbers_without_a_dot_and_quoted_ones():
    assert parse_assignments(["optimizer.lr=1e-3", "policy.target_modules=[1e-3, '1e-3']", "reward='2'"]) == {
        "optimizer": {"lr": 0.001},
        "policy": {"target_modules": [0.001, "1e-3"]},
        "reward": "2",
    }


def test_a_text_with_a_dollar_stays_that_text(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert make_config(flags={"model": "${oc.env:SECRET}"}).model == "${oc.env:SECRET}"


@pytest.mark.parametrize(
    "layers", [({"objective": [1]}, {"objective": {"alpha": 1}}), ({"model": "${"}, {}), ({None: 1}, {})]
)
def test_layers_that_do_not_go_together_are_one_line(layers):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        make_config(file=layers[0], assignments=layers[1])


def test_trackers():
    config = make_config(assignments=parse_assignments(["logging.trackers=[tensorboard]"]))
    assert config.logging.trackers == ("tensorboard",)
    assert "'tensorboard', 'wandb' or 'trackio'" in refused("logging.trackers=[mlflow]")
