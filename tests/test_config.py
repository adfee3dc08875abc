from __future__ import annotations

import pytest
import yaml

from sqdf_fast.config import (
    PRESETS,
    default_preset,
    describe_settings,
    dump_config,
    given_settings,
    make_config,
    parse_assignments,
    read_config_file,
    setting_names,
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
        ("objective.gama=1", "objective.gamma"),
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
    text = describe_settings()
    for name in setting_names():
        assert f"  {name} " in text
    assert set(yaml.safe_load(dump_config(make_config()))) == {name.split(".")[0] for name in setting_names()}


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
