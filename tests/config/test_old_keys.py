"""Configuration files of version 0.1.0: each value keeps its meaning, each old key is answered with its new name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sqdf_fast.config import (
    ALGORITHM_SETTINGS,
    OLD_KEYS,
    current_names,
    dotted,
    dump_config,
    given_settings,
    make_config,
    old_keys,
    parse_assignments,
    read_config_file,
    section_of,
    with_settings,
)
from sqdf_fast.errors import UserError
from sqdf_fast.plan import Plan
from sqdf_fast.runs.folder import RunFolder

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def nothing_announced():
    old_keys._announce.cache_clear()


def stored(algorithm: str) -> Path:
    """What `train` wrote; each algorithm's own settings differ from the defaults."""
    return DATA / f"version_0_1_0_{algorithm}.yaml"


@pytest.mark.parametrize("algorithm", ALGORITHM_SETTINGS)
def test_every_value_of_an_old_file_means_what_it_meant(algorithm):
    old = dotted(yaml.safe_load(stored(algorithm).read_text()))
    config = make_config(file=read_config_file(stored(algorithm)))
    values = dotted(config.model_dump(mode="json"))
    assert config.algorithm == algorithm
    for key, value in old.items():
        for new in OLD_KEYS.get(key, (key,)):
            if config.reads(new):
                assert values[new] == ("none" if value == "resident" else value), key


@pytest.mark.parametrize("algorithm", ALGORITHM_SETTINGS)
def test_an_old_file_is_dumped_under_new_names_and_reads_back(algorithm, tmp_path):
    config = make_config(file=read_config_file(stored(algorithm)))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    dumped = dotted(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert not OLD_KEYS.keys() & dumped.keys()
    own = {key for key in dumped if key.partition(".")[0] in map(section_of, ALGORITHM_SETTINGS)}
    fields = ALGORITHM_SETTINGS[algorithm].model_fields
    assert own == {f"{section_of(algorithm)}.{name}" for name in fields}
    again = RunFolder.open(tmp_path)[1]
    assert dump_config(again) == dump_config(config)


def test_what_an_old_file_sets_is_not_the_users():
    assert given_settings(read_config_file(stored("ddpo")), {"steps": 3}) == ("steps",)


def test_each_old_key_is_named_once_with_the_new_one(caplog):
    for _ in range(2):
        make_config(file=read_config_file(stored("awm")))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(OLD_KEYS)
    assert "setting execution.recompute is now execution.gradient_checkpointing" in lines
    assert "setting baseline.clip_range is now ddpo.clip_range or dpok.clip_range" in lines


def test_an_old_key_of_the_command_line_is_the_chosen_algorithms(caplog):
    given = parse_assignments(["algorithm=dpok", "baseline.timesteps=5", "execution.residency=resident"])
    config = make_config("shapes", assignments=given)
    assert (config.dpok.timesteps, config.ddpo.timesteps, config.execution.offload) == (5, None, "none")
    assert given_settings(assignments=given) == ("algorithm", "execution.offload", "dpok.timesteps")
    assert caplog.messages == [
        "setting execution.residency is now execution.offload",
        "setting baseline.timesteps is now ddpo.timesteps, dpok.timesteps or awm.timesteps",
    ]
    with pytest.raises(UserError, match=r"setting refl\.margin has no effect with algorithm = dpok \(only with refl\)"):
        make_config("shapes", assignments=parse_assignments(["algorithm=dpok", "baseline.margin=2"]))


def test_the_new_name_wins_over_the_old_one():
    assert make_config(file={"execution": {"residency": "resident", "offload": "staged"}}).execution.offload == "staged"


def test_old_keys_of_a_method_and_of_what_methods_share():
    shared = with_settings(make_config("shapes"), {"baseline.timesteps": 5}, shared=True)
    assert (shared.ddpo.timesteps, shared.dpok.timesteps, shared.awm.timesteps) == (5, 5, 5)
    method = with_settings(shared, {"algorithm": "awm", "baseline.timesteps": 3})
    assert (method.ddpo.timesteps, method.awm.timesteps) == (5, 3)


def test_the_settings_of_a_stored_plan():
    old = {"execution.residency": "resident", "execution.network_rows": 2, "sampling.batch_size": 4}
    expected = {"execution.offload": "none", "execution.backward_batch_rows": 2, "sampling.batch_size": 4}
    assert current_names(old) == expected
    plan = Plan(True, "shapes", "CPU", 2.0, 1.0, 0.1, "staged", 1, old, (), 1.0, 1.0)
    assert Plan.from_json(plan.as_json()).settings == expected


@pytest.mark.parametrize("settings", [{"execution": 3}, {"baseline": [1]}, {"execution": {"residency": ["x"]}}])
def test_old_sections_that_are_no_settings_are_one_line(settings):
    with pytest.raises(UserError, match=r"^setting [^\n]*$"):
        make_config(file=settings)
