from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sqdf_fast.compare.command import Comparison, protocol_of
from sqdf_fast.compare.methods import ABLATIONS, METHODS, ablation, builtin, method_config
from sqdf_fast.compare.names import look_up
from sqdf_fast.compare.protocol import (
    _announce,
    dump_protocol,
    grown,
    make_protocol,
    parse_budget,
    read_protocol,
)
from sqdf_fast.config import dotted, make_config, settings_of
from sqdf_fast.config.merging import merge, nested
from sqdf_fast.errors import UserError


@pytest.mark.parametrize(
    ("text", "rows", "seconds"),
    [
        ("20000", 20000, None),
        ("20_000", 20000, None),
        ("20,000", 20000, None),
        ("20k", 20000, None),
        ("120s", None, 120.0),
        ("2m", None, 120.0),
        ("1.5 min", None, 90.0),
        ("0.5h", None, 1800.0),
    ],
)
def test_budgets(text, rows, seconds):
    found = parse_budget(text)
    assert (found.unet_evaluations, found.seconds) == (rows, seconds)


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "12 rows", "s", "1.5", "1e4", "k", "2 days"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match=f"^invalid budget '{text}': expected UNet evaluations"):
        parse_budget(text)


SMALL = {"preset": "shapes", "budget": 1000, "methods": ["sqdf", "draft-1"]}
TUNED = {
    "budget": "1000",
    "seeds": [0, 1],
    "methods": {
        "sqdf": {"trials": [{"objective.alpha": 4}, {"objective": {"alpha": 8}}]},
        "draft-1": {"grid": {"optimizer.lr": [1e-3, 1e-2]}},
    },
    "tuning": {"budget": 300, "trials": 2, "seed": 7},
}


def changed(values: dict, **changes) -> dict:
    return {**values, **changes}


def test_short_forms():
    protocol = make_protocol(SMALL)
    assert protocol.budget == "1000"
    assert list(protocol.methods) == ["sqdf", "draft-1"]
    assert protocol.seeds == (0, 1, 2)
    assert protocol.settings_of("draft-1")["algorithm"] == "draft"
    tuned = make_protocol(TUNED)
    assert tuned.methods["sqdf"].tried == [{"objective.alpha": 4}, {"objective.alpha": 8}]
    assert tuned.methods["draft-1"].tried == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-2}]


def test_a_method_of_ones_own_starts_from_a_known_one():
    protocol = make_protocol({"budget": "5s", "methods": {"mine": {"like": "sqdf", "settings": {"policy.rank": 2}}}})
    assert protocol.settings_of("mine") == {"algorithm": "sqdf", "policy.rank": 2}


def test_protocols_with_an_old_key_load_with_one_line_that_names_the_new_one(caplog):
    _announce.cache_clear()
    study = Path(__file__).parents[2] / "bench" / "study" / "study.yaml"
    protocol = make_protocol(read_protocol(study))
    assert protocol.sweep_of("best-of-n") == (1, 2, 4, 8)
    assert protocol.sweep_of("guided") == (0, 1, 4, 16)
    assert caplog.messages == ["the key strengths of a protocol's methods is now sweep"]
    assert "strengths" not in dump_protocol(protocol)


def test_written_and_read_back(tmp_path):
    protocol = make_protocol(TUNED)
    path = tmp_path / "protocol.yaml"
    path.write_text(dump_protocol(protocol))
    assert make_protocol(read_protocol(path)) == protocol


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(SMALL, budget="soon"), "invalid budget 'soon'"),
        (changed(SMALL, methods=["sqfd"]), "method 'sqfd' is unknown; did you mean 'sqdf'"),
        (changed(SMALL, methods=[]), "methods"),
        (changed(SMALL, methods={"a/b": {"like": "sqdf"}}), "'a/b' cannot name a folder"),
        (changed(SMALL, methods={"sqdf": {"sweep": [1, 2]}}), "only best-of-n and guided have one"),
        (changed(SMALL, seeds=[1, 1]), "seeds: 1 is given twice"),
        (changed(SMALL, seeds=[]), "seeds"),
        (changed(SMALL, points=1), "points = 1"),
        (changed(SMALL, ablate=["gama"]), "'gama' is unknown; allowed: gamma"),
        (changed(SMALL, ablate=["gamma"], methods=["draft-1"]), "ablated = 'sqdf' is not one of the methods"),
        (changed(SMALL, ablated="mine"), r"ablated = 'mine' is not one of the methods \(sqdf, draft-1\); add it"),
        (changed(SMALL, ablate=["gamma"], ablated="draft-1"), "which the method 'draft-1' does not read"),
        (changed(SMALL, methods={"best-of-n": {"sweep": [1, 1.5]}}), "1.5 candidates; give integers >= 1"),
        (changed(SMALL, methods={"best-of-n": {"sweep": [0]}}), "0 candidates; give integers >= 1"),
        (changed(SMALL, methods={"guided": {"sweep": [0, -1]}}), "a guidance scale of -1; give numbers >= 0"),
        (changed(SMALL, methods={"guided": {"sweep": [2, 2]}}), "methods.guided.sweep: 2.0 is given twice"),
        (changed(SMALL, sedes=[1]), "'sedes' is unknown; did you mean 'seeds'"),
        (changed(TUNED, tuning=None), "method 'sqdf' has trials but the protocol has no tuning"),
        (changed(TUNED, tuning={"budget": 300, "trials": 3}), "has 2 tuning trials and every method gets 3"),
        (changed(TUNED, tuning={"budget": 300, "trials": 2, "seed": 1}), "one of the reported seeds"),
        (
            changed(TUNED, tuning={"budget": 300, "trials": 2, "reward": "true_reward"}),
            "may not look at true_reward",
        ),
        (changed(TUNED, tuning={"budget": "x", "trials": 2}), "invalid budget 'x'"),
    ],
)
def test_refused(values, said):
    with pytest.raises(UserError, match=said) as error:
        make_protocol(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["algorithm", "seed", "steps", "limits.seconds", "evaluation.points"])
def test_what_the_comparison_decides_is_not_set(key):
    with pytest.raises(UserError, match=f"settings.{key} is decided by the comparison"):
        make_protocol(changed(SMALL, settings={key: 1})).base()


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"^protocol .*gone\.yaml: cannot be read"):
        read_protocol(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="expected a mapping"):
        read_protocol(tmp_path / "list.yaml")


def test_the_command_lines_settings_win_over_the_files():
    values = changed(SMALL, settings={"objective": {"alpha": 1, "gamma": 0.8}, "policy.rank": 2}, seeds=[5])
    found = protocol_of(values, {"objective": {"alpha": 3}}, ["draft-1"], budget="2s", seeds=[], ablate=None)
    assert found.settings == {"objective.alpha": 3, "objective.gamma": 0.8, "policy.rank": 2}
    assert (list(found.methods), found.budget, found.seeds) == (["draft-1"], "2s", (5,))


def test_a_folder_grows_by_seeds_methods_and_ablations_and_forgets_none():
    known = make_protocol(changed(SMALL, ablate=["gamma"], ablate_seeds=[0]))
    assert grown(known, known, Path("out")) == known
    more = grown(known, make_protocol(changed(SMALL, seeds=[3, 0], methods=["sqdf", "awm"])), Path("out"))
    assert list(more.methods) == ["sqdf", "draft-1", "awm"]
    assert (more.seeds, more.ablate, more.ablate_seeds) == ((0, 1, 2, 3), ("gamma",), (0,))
    ablated = make_protocol(changed(SMALL, ablate=["alpha"], ablate_seeds=[1]))
    more = grown(known, ablated, Path("out"))
    assert (more.ablate, more.ablate_seeds) == (("gamma", "alpha"), (0, 1))
    assert grown(make_protocol(SMALL), ablated, Path("out")).ablate_seeds == (1,)
    assert grown(ablated, make_protocol(changed(SMALL, ablate=["gamma"])), Path("out")).ablate_seeds is None


def test_a_folder_refuses_anything_else():
    known = make_protocol(SMALL)
    with pytest.raises(
        UserError, match=r"^out belongs to another comparison: its budget is 1000, not 2000; choose another"
    ):
        grown(known, make_protocol(changed(SMALL, budget=2000)), Path("out"))
    other = {"sqdf": {"settings": {"policy.rank": 2}}}
    with pytest.raises(UserError, match=r"its methods\.sqdf is"):
        grown(known, make_protocol(changed(SMALL, methods=other)), Path("out"))


def test_a_method_that_is_added_to_a_folder_joins_the_others(tmp_path):
    (tmp_path / "protocol.yaml").write_text(dump_protocol(make_protocol(SMALL)))
    found = Comparison(make_protocol(changed(SMALL, methods=["awm"])), tmp_path)
    assert list(found.protocol.methods) == ["sqdf", "draft-1", "awm"]
    assert [run.name for run in found.report().runs] == ["sqdf", "draft-1", "awm"]


def test_on_a_consistency_model_every_algorithm_looks_ahead_by_it(tmp_path):
    settings = {"policy.base": "consistency", "sampling.guidance_scale": 1}
    found = Comparison(make_protocol(changed(SMALL, settings=settings, methods=["sqdf", "draft-1"])), tmp_path)
    assert found.own["draft-1"] == {"algorithm": "draft", "draft.truncation": 1}
    # What is set on purpose is refused all the same.
    looking = changed(SMALL, settings=settings, methods={"sqdf": {"settings": {"objective.lookahead": "tweedie"}}})
    with pytest.raises(UserError, match=r"method 'sqdf': objective\.lookahead = tweedie is incompatible with"):
        Comparison(make_protocol(looking), tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"model": "nomodel"}, "model 'nomodel' is unknown; allowed: 'shapes', 'sd15'"),
        ({"prompts": "gone.txt"}, "prompts 'gone.txt': neither a file nor a named set"),
        ({"evaluation.prompts": "shape"}, "prompts 'shape': neither a file nor a named set; did you mean 'shapes'"),
        ({"reward": "tast"}, "reward 'tast' is unknown; did you mean 'taste'"),
        ({"reward": "taste + gone:reward"}, "reward module 'gone' cannot be imported"),
        ({"evaluation.judges": ["lpip"]}, "judge 'lpip' is unknown; did you mean 'lpips'"),
        ({"evaluation.held_out": ["nope"]}, "reward 'nope' is unknown"),
        ({"reward": "jpeg"}, "reward 'jpeg' has no gradient for sqdf, guided to follow; choose among the methods ddpo"),
        ({"reward": "taste + jpeg*0.1"}, "reward 'jpeg' has no gradient for sqdf, guided to follow"),
    ],
)
def test_what_is_not_there_is_refused_before_the_first_run(tmp_path, settings, said):
    methods = ["sqdf", "ddpo", "best-of-n", "guided"]
    found = Comparison(make_protocol(changed(SMALL, settings=settings, methods=methods)), tmp_path / "out")
    with pytest.raises(UserError, match=re.escape(said)) as error:
        found.run()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_reward_without_a_gradient_is_for_methods_that_need_none():
    look_up(make_config("shapes", flags={"reward": "jpeg"}), [])
    look_up(make_config("sdxl", flags={"model": "owner/name"}), ["sqdf"])


def test_dotted():
    assert dotted({"a": {"b": 1, "c": {"d": 2}}, "e.f": 3, "g": []}) == {"a.b": 1, "a.c.d": 2, "e.f": 3, "g": []}


def test_what_methods_share_reaches_those_that_read_it_and_is_read_by_one_at_least(tmp_path):
    shared = {"awm.timesteps": 3, "objective.gamma": 0.8}
    found = Comparison(make_protocol(changed(SMALL, settings=shared, methods=["sqdf", "awm"])), tmp_path)
    configs = {name: method_config(found.base, name, found.own[name]) for name in found.own}
    assert (configs["sqdf"].objective.gamma, configs["awm"].awm.timesteps) == (0.8, 3)
    for key in ("awm.timesteps", "baseline.timesteps"):
        with pytest.raises(UserError, match=rf"^setting {key} has no effect with algorithm = sqdf \(only with"):
            Comparison(make_protocol(changed(SMALL, settings={key: 3})), tmp_path)
    Comparison(make_protocol(changed(SMALL, settings={"baseline.timesteps": 3}, methods=["awm"])), tmp_path)
    own = make_protocol(changed(SMALL, methods={"sqdf": {"settings": {"awm.timesteps": 3}}}))
    with pytest.raises(UserError, match=r"^method 'sqdf': setting awm\.timesteps has no effect .*\(only with awm\)"):
        Comparison(own, tmp_path)


def test_variants_of_the_lookahead_leave_the_steps_of_another_one_behind(tmp_path):
    methods = {"sqdf": {"settings": {"objective.lookahead": "deterministic", "objective.lookahead_steps": 3}}}
    found = Comparison(make_protocol(changed(SMALL, methods=methods, ablate=["lookahead"])), tmp_path)
    variants = {one.name: one.config.objective for one in found._expand({"sqdf": {}})}
    assert variants["sqdf"].lookahead_steps == 3
    assert variants["sqdf.lookahead-tweedie"].lookahead == "tweedie"
    assert variants["sqdf.lookahead-deterministic-4"].lookahead_steps == 4


STUDY, DATA = Path(__file__).parents[2] / "bench" / "study", Path(__file__).parent / "data"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "longer"])
def test_the_recorded_protocols_mean_what_they_meant(name, tmp_path):
    """Trials, methods and variants, in what their algorithm reads, are those of version 0.1.0."""
    found = Comparison(make_protocol(read_protocol(STUDY / f"{name}.yaml")), tmp_path)
    configs = {job.name: job.config for job in found._trials()}
    configs |= {one.name: one.config for one in found._expand({method: {} for method in found.own})}
    recorded = yaml.safe_load((DATA / f"version_0_1_0_{name}.yaml").read_text())
    assert configs.keys() == recorded["runs"].keys()
    for run, settings in recorded["runs"].items():
        assert settings_of(configs[run]) == settings_of(
            make_config(file=merge(recorded["shared"], nested(settings)))
        ), run


BASE = make_config("shapes")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_is_a_configuration(name):
    config = method_config(BASE, name, builtin(name))
    assert config.reward == BASE.reward
    assert (config.objective.lookahead == "consistency") == name.startswith("sqdf")


def test_settings_that_have_to_be_alike():
    for key in ("reward", "evaluation.num_prompts", "seed", "limits.seconds", "monitor.action"):
        with pytest.raises(UserError, match=f"method 'x' sets {key}, which must be equal"):
            method_config(BASE, "x", {key: 1})
    with pytest.raises(UserError, match=r"method 'x': setting 'objective.alpa' is unknown; did you mean"):
        method_config(BASE, "x", {"objective.alpa": 1})


def test_ablations_change_what_they_are_called_after():
    # The preset has gamma .9, discounted credit, the consistency look-ahead, uniform replay, 8 steps a refill.
    same = {
        axis: [name for name, new in ablation(axis, BASE).items() if method_config(BASE, name, new) == BASE]
        for axis in ABLATIONS
    }
    assert same == {
        "gamma": ["gamma-0.9"],
        "credit": ["credit-discount"],
        "lookahead": ["lookahead-consistency"],
        "buffer": ["buffer-uniform"],
        "replay-ratio": ["replay-ratio-8"],
        "alpha": ["alpha-x1"],
    }
    alphas = [new["objective.alpha"] for new in ablation("alpha", BASE).values()]
    assert alphas == [0.0, BASE.objective.alpha / 4, BASE.objective.alpha, BASE.objective.alpha * 4]
    gammas = [method_config(BASE, name, new).objective.gamma for name, new in ablation("gamma", BASE).items()]
    assert gammas == [1.0, 0.95, 0.9, 0.85]
    lookaheads = [method_config(BASE, name, new).objective for name, new in ablation("lookahead", BASE).items()]
    assert [(one.lookahead, one.lookahead_steps) for one in lookaheads[:3]] == [
        ("tweedie", 2),
        ("deterministic", 2),
        ("deterministic", 4),
    ]
    with pytest.raises(UserError, match="--ablate credits: unknown"):
        ablation("credits", BASE)
