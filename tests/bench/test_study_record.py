"""The study's page, of a comparison of which nothing has run yet, and of an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study import comparison

from sqdf_fast.compare.command import Comparison
from sqdf_fast.compare.curves import Curve, Point
from sqdf_fast.compare.protocol import dump_protocol, make_protocol, read_protocol
from sqdf_fast.compare.results import Runs, make_results


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "study"
    found.mkdir()
    methods = {"sqdf": {}, "draft-1": {}}
    protocol = make_protocol(
        {"preset": "shapes", "budget": 64, "seeds": [0], "methods": methods, "ablate": ["gamma"], "ablate_seeds": [0]}
    )
    Comparison(protocol, found)
    (found / "protocol.yaml").write_text(dump_protocol(protocol))
    return found


def test_what_has_not_run_is_said(folder, tmp_path, capsys):
    comparison.main([str(folder), "--output", str(tmp_path / "docs")])
    assert "Fewer than two methods have finished runs." in capsys.readouterr().out
    text = (tmp_path / "docs" / "study_results.md").read_text()
    assert "| not run yet | sqdf seed 0; draft-1 seed 0; sqdf.gamma-1 seed 0; " in text
    assert "64 UNet evaluations a run, seeds 0." in text
    assert "](images/" not in text
    figures = json.loads((tmp_path / "docs" / "study_results.json").read_text())
    assert [method["name"] for method in figures["methods"]][:3] == ["sqdf", "draft-1", "sqdf.gamma-1"]


def test_plots_stand_under_their_group(folder, tmp_path):
    for plots in comparison.PLOTS.values():
        for plot in plots.values():
            (folder / "plots").mkdir(exist_ok=True)
            (folder / "plots" / plot).write_bytes(plot.encode())
    docs = tmp_path / "docs"
    comparison.main([str(folder), "--output", str(docs)])
    methods, gamma = (docs / "study_results.md").read_text().split("## Methods")[1].split("## Ablation: gamma")
    assert methods.index("](images/study_pictures.png)") < methods.index("At the end of training:")
    assert "](images/study_gamma.png)" in gamma
    # Of axes that are not in the protocol nothing is shown.
    assert "study_alpha" not in methods + gamma
    assert (docs / "images" / "study_gamma.png").read_bytes() == b"ablation_gamma_alignment_against_proxy_reward.png"


@pytest.mark.parametrize("name", ["study", "longer"])
def test_the_committed_protocols_are_accepted(name, tmp_path):
    protocol = make_protocol(read_protocol(Path(comparison.__file__).with_name(f"{name}.yaml")))
    # Names, settings, prompts and grids are looked up before anything runs.
    assert Comparison(protocol, tmp_path).protocol == protocol


def test_cost_is_that_of_the_fastest_seed_and_of_training_alone():
    def runs(name: str, seconds: tuple[float, float], group: str = "", free: bool = False) -> Runs:
        curves = [
            Curve(
                seed, [Point(0, {"proxy_reward": 0.0}, {}, dict.fromkeys(costs, 0.0)), Point(9, score, {}, costs)], peak
            )
            for seed, (each, peak) in enumerate(zip(seconds, (2.0**20, 2.0**21), strict=True))
            for score in [{"proxy_reward": 1.0}]
            for costs in [{"unet_evaluations": 2000.0 + 100 * seed, "reward_evaluations": 50.0, "seconds": each}]
        ]
        return Runs(name, name, group, {}, curves, [Path()] * len(curves), {}, free)

    every = [runs("sqdf", (30.0, 20.0)), runs("guided", (1.0, 1.0), free=True), runs("sqdf", (30.0, 20.0), "gamma")]
    protocol = make_protocol({"budget": 2000, "methods": {"sqdf": {}}})
    heads, rows = comparison.cost_table(make_results(protocol, [*every, runs("gamma-1", (8.0, 9.0), "gamma")], {}, {}))
    assert len(heads) == 6
    assert rows == [
        ["sqdf", "2,100", "50", "20", "9.5", "2.0 MiB"],
        ["gamma-1", "2,000", "50", "8", "4.0", "2.0 MiB"],
    ]


def test_what_is_no_study_is_refused_in_one_line(tmp_path, command, capsys):
    (tmp_path / "study").mkdir()
    for folder, said in (
        (tmp_path / "study", "is not a comparison"),
        (tmp_path, "name the folder after one of bench/study/*.yaml"),
    ):
        assert command("study", str(folder), "--output", str(tmp_path / "docs")) == 2
        captured = capsys.readouterr().err
        assert said in captured
        assert captured.count("\n") == 1
    assert not (tmp_path / "docs").exists()
