"""The study's page, of a comparison of which nothing has run yet, and of an empty folder."""

from __future__ import annotations

import json

import pytest
from study import record

from sqdf_fast.compare.command import Comparison
from sqdf_fast.compare.protocol import dump_protocol, make_protocol


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "runs"
    found.mkdir()
    methods = {"sqdf": {}, "draft-1": {}}
    protocol = make_protocol(
        {"preset": "shapes", "budget": 64, "seeds": [0], "methods": methods, "ablate": ["gamma"], "ablate_seeds": [0]}
    )
    Comparison(protocol, found)
    (found / "protocol.yaml").write_text(dump_protocol(protocol))
    return found


def test_what_has_not_run_is_said(folder, tmp_path, capsys):
    assert record.main([str(folder), "--docs", str(tmp_path / "docs")]) == 0
    assert "Fewer than two methods have finished runs." in capsys.readouterr().out
    text = (tmp_path / "docs" / "study_results.md").read_text()
    assert "| not run yet | sqdf seed 0; draft-1 seed 0; sqdf.gamma-1 seed 0; " in text
    assert "64 UNet evaluations a run, seeds 0." in text
    assert "](images/" not in text
    figures = json.loads((tmp_path / "docs" / "study_results.json").read_text())
    assert [method["name"] for method in figures["methods"]][:3] == ["sqdf", "draft-1", "sqdf.gamma-1"]


def test_plots_stand_under_their_group(folder, tmp_path):
    for plots in record.PICTURES.values():
        for plot in plots.values():
            (folder / "plots").mkdir(exist_ok=True)
            (folder / "plots" / plot).write_bytes(plot.encode())
    docs = tmp_path / "docs"
    assert record.main([str(folder), "--docs", str(docs)]) == 0
    methods, gamma = (docs / "study_results.md").read_text().split("## Methods")[1].split("## Ablation: gamma")
    assert methods.index("](images/study_pictures.png)") < methods.index("At the end of training:")
    assert "](images/study_gamma.png)" in gamma
    # Of axes that are not in the protocol nothing is shown.
    assert "study_alpha" not in methods + gamma
    assert (docs / "images" / "study_gamma.png").read_bytes() == b"ablation_gamma_alignment_against_proxy_reward.png"


def test_a_folder_without_a_comparison_is_refused_in_one_line(tmp_path, capsys):
    assert record.main([str(tmp_path), "--docs", str(tmp_path / "docs")]) == 2
    assert "is no comparison" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
