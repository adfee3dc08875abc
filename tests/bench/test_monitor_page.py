"""The monitor's page, of runs that are made up."""

from __future__ import annotations

import json

from PIL import Image
from study import monitor


def outcome(name, seed, folder, assignments):
    """A collapse for "draft", a steady rise for "sqdf"."""
    records = []
    for index in range(6):
        scores = {"proxy_reward": index, "true_reward": index, "alignment": 0.5, "diversity": 1.0, "kl": 0.01 * index}
        if name == "draft" and index > 2:
            scores |= {"alignment": 0.1, "true_reward": -index}
        record = {"step": 5 * index, **{f"eval_{score}": float(value) for score, value in scores.items()}}
        for score in ("proxy_reward", "alignment", "diversity"):
            value = record[f"eval_{score}"]
            record |= {f"eval_{score}_low": value - 0.01, f"eval_{score}_high": value + 0.01}
        records.append(record)
    return monitor.Outcome(name, seed, records)


def test_page_figures_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "outcome", outcome)
    docs = tmp_path / "docs"
    monitor.main(["--seeds", "3", "4", "--output", str(docs)])
    text = (docs / "monitor_results.md").read_text(encoding="utf-8")
    assert "| sqdf | 4 | 0, 5, ..., 25 | 0.00, 5.00 | 0.00, 5.00, 5.00 | 25 | none |  |  |" in text
    # Fallen at 15 and 20, after the peak at 10, which is the last good evaluation.
    assert "| draft | 3 | 0, 5, ..., 25 | 0.00, 5.00 | 0.00, 2.00, -5.00 | 10 | 20 | alignment | 10 (2.00) |" in text
    assert "\n| 20* | 4.000 | -4.000 |" in text
    assert "](images/monitor_results.png)" in text
    assert Image.open(docs / "images" / "monitor_results.png").width > 500
    runs = json.loads((docs / "monitor_results.json").read_text(encoding="utf-8"))
    assert [(run["run"], run["seed"]) for run in runs] == [("sqdf", 3), ("sqdf", 4), ("draft", 3), ("draft", 4)]
    assert runs[2]["evaluations"][3]["eval_true_reward"] == -3.0


def test_the_page_in_docs_is_that_of_the_recorded_figures(tmp_path):
    monitor.main(["--recorded", "--output", str(tmp_path)])
    recorded = (monitor.DOCS / "monitor_results.md").read_text(encoding="utf-8")
    assert (tmp_path / "monitor_results.md").read_text(encoding="utf-8") == recorded
    assert not (tmp_path / "monitor_results.json").exists()
