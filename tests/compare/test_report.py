from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from sqdf_fast.compare.curves import Curve, Point
from sqdf_fast.compare.figures import figures
from sqdf_fast.compare.page import verdict, write_page
from sqdf_fast.compare.protocol import make_protocol
from sqdf_fast.compare.results import Results, Runs, make_results, write_results
from sqdf_fast.compare.table import Table, as_text, group_tables, tuning_sentence
from sqdf_fast.compare.tuning import Trial, choose
from sqdf_fast.runs import save_samples

VOID = frozenset({"meta", "link", "img", "br"})
PROMPTS = ["a red star", "a <b>bold</b> ring"]


class Page(HTMLParser):
    """Checks that tags nest, and collects addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def curve(seed: int, gain: float, harm: float) -> Curve:
    """Proxy 0 to ``gain`` in two steps; the true reward follows it but for ``harm`` a unit of proxy."""
    points = [
        Point(
            step,
            {"proxy_reward": proxy, "true_reward": (1 - harm) * proxy, "diversity": 1 - harm * proxy},
            {"true_reward": [(1 - harm) * proxy - 0.01, (1 - harm) * proxy + 0.01]},
            {"unet_evaluations": 100.0 * step, "seconds": float(step), "reward_evaluations": 10.0 * step},
        )
        for step, proxy in ((0, 0.0), (10, gain / 2), (20, gain))
    ]
    return Curve(seed, points, 2.0**20)


@pytest.fixture
def folder(tmp_path) -> Path:
    for method in ("sqdf", "draft-1", "asleep"):
        for seed in (0, 1):
            for step in (0, 10, 20):
                images = torch.full((2, 3, 8, 8), step / 20)
                save_samples(tmp_path / "runs" / method / f"seed-{seed}", step, images, PROMPTS, [1, 2])
    return tmp_path


@pytest.fixture
def results(folder) -> Results:
    protocol = make_protocol(
        {
            "budget": 2000,
            "seeds": [0, 1],
            "methods": {
                "sqdf": {"trials": [{"objective.alpha": 1}]},
                "draft-1": {"trials": [{"optimizer.lr": 1.0}]},
                "asleep": {"like": "ddpo", "trials": [{}]},
                "gone": {"like": "ddpo", "trials": [{}]},
            },
            "tuning": {"budget": 100, "trials": 1},
        }
    )

    def runs(name: str, gain: float, harm: float, label: str = "", group: str = "") -> Runs:
        folders = [folder / "runs" / name / f"seed-{seed}" for seed in (0, 1)]
        return Runs(name, label or name, group, {}, [curve(seed, gain, harm) for seed in (0, 1)], folders, {})

    choices = {
        name: choose([Trial({"objective.alpha": 1}, curve(0, 1.0, 0.0))], protocol.tuning)
        for name in ("sqdf", "draft-1", "asleep", "gone")
    }
    every = [
        runs("sqdf", 4.0, 0.25),
        runs("draft-1", 2.0, 0.5),
        runs("asleep", 0.1, 0.0),
        Runs("gone", "gone", "", {}, [], [], {0: "no <light>", 1: "no light"}),
        runs("sqdf", 4.0, 0.25, "gamma-0.9 (sqdf itself)", "gamma"),
        runs("draft-1", 3.0, 0.75, "gamma-1", "gamma"),
    ]
    return make_results(protocol, every, choices, {"torch": "2"})


def table(results: Results, group: str, kind: str) -> Table:
    return group_tables(results, group)[kind][1]


def test_scores_and_costs_at_equal_reward(results):
    assert (results.levels[""].value, results.levels[""].set_by) == (2.0, "draft-1")
    assert results.levels[""].left_out == ["asleep"]
    assert results.levels["gamma"].value == 3.0
    sqdf, draft, asleep, gone = results.equal[:4]
    assert sqdf.scores["true_reward"].mean == pytest.approx(1.5)
    assert sqdf.scores["true_reward"].over == "seeds and prompts"
    assert sqdf.scores["diversity"].mean == pytest.approx(0.5)
    assert sqdf.scores["diversity"].over == "seeds"
    assert sqdf.costs == {
        "unet_evaluations": pytest.approx(1000.0),
        "reward_evaluations": pytest.approx(100.0),
        "seconds": pytest.approx(10.0),
        "peak_bytes": 2**20,
    }
    assert draft.costs["unet_evaluations"] == pytest.approx(2000.0)
    assert (draft.scores["true_reward"].mean, asleep.reached, gone.seeds) == (pytest.approx(1.0), 0, 0)
    assert results.end[0].scores["true_reward"].mean == pytest.approx(3.0)


def test_duels_are_at_the_weaker_ones_best(results):
    against = {comparison.other: comparison for comparison in results.comparisons_of("")}
    assert set(against) == {"draft-1", "asleep"}
    assert against["draft-1"].level == 2.0
    assert against["draft-1"].differences["true_reward"].mean == pytest.approx(0.5)
    assert against["draft-1"].differences["true_reward"].low == pytest.approx(0.5)
    assert against["draft-1"].costs["unet_evaluations"] == pytest.approx(0.5)
    assert against["asleep"].level == pytest.approx(0.1)
    assert verdict(results) == [
        "At equal proxy reward, the true reward of sqdf is higher than draft-1; lower than asleep.",
        "Its diversity is higher than draft-1; lower than asleep.",
    ]


def test_the_verdict_is_of_the_scores_that_were_measured(results):
    def only(*scores: str) -> Results:
        def judged(curve: Curve) -> Curve:
            return replace(
                curve, points=[replace(one, scores={name: one.scores[name] for name in scores}) for one in curve.points]
            )

        runs = [replace(run, curves=[judged(curve) for curve in run.curves]) for run in results.runs]
        return make_results(results.protocol, runs, {}, {})

    said = "At equal proxy reward, the diversity of sqdf is higher than draft-1; lower than asleep."
    assert verdict(only("proxy_reward", "diversity")) == [said]
    assert verdict(only("proxy_reward")) == ["No score but the proxy reward was measured."]


def test_an_ablation_has_duels_with_its_variants(results):
    (comparison,) = results.comparisons_of("gamma")
    assert (comparison.one, comparison.other, comparison.level) == ("sqdf", "gamma-1", 3.0)
    assert table(results, "gamma", "differences")[1][0][0] == "gamma-1"


def test_tables(results):
    heads, rows = table(results, "", "end")
    assert heads[:4] == ["method", "proxy reward", "true reward", "diversity"]
    assert rows[0][2] == "3.000 [2.990, 3.010]"
    assert rows[0][-4:] == ["2,000", "200", "20 s", "1.0 MiB"]
    assert rows[3] == ["gone", "no <light>"]
    assert table(results, "", "equal")[1][2] == ["asleep", "reached by 0 of 2 seeds (best 0.100)"]
    assert table(results, "gamma", "equal")[1][0][0] == "gamma-0.9 (sqdf itself)"
    assert table(results, "", "differences")[1][0][:3] == ["draft-1", "2.000", "+0.500 [+0.500, +0.500]"]
    text = as_text(results)
    assert "At equal proxy reward 2.000, the best that every seed of draft-1 reached (not set by asleep" in text
    assert "ablation of gamma" in text


def test_what_stands_at_the_level_before_training_says_so(results):
    ahead = Runs("ahead", "ahead", "", {}, [curve(0, 3.0, 0.0)], [Path()], {})
    points = [replace(one, scores={**one.scores, "proxy_reward": 5.0}) for one in ahead.curves[0].points]
    ahead = replace(ahead, curves=[replace(ahead.curves[0], points=points)])
    found = make_results(results.protocol, [*results.runs[:2], ahead, replace(ahead, training_free=True)], {}, {})
    assert [row[0] for row in table(found, "", "equal")[1]] == ["sqdf", "draft-1", "ahead (before training)", "ahead"]
    assert [row[0] for row in table(found, "", "end")[1]] == ["sqdf", "draft-1", "ahead", "ahead"]
    assert [row[0] for row in table(found, "", "differences")[1]] == [
        "draft-1",
        "ahead (ahead before training)",
        "ahead",
    ]


def test_differences_have_the_judges_that_were_asked_for(results):
    def judged(run: Runs) -> Runs:
        more = {"sharpness": 1.0, "lpips_diversity": 2.0, "vendi": 3.0}
        points = [[replace(one, scores={**one.scores, **more}) for one in found.points] for found in run.curves]
        return replace(run, curves=[replace(old, points=new) for old, new in zip(run.curves, points, strict=True)])

    found = make_results(results.protocol, [judged(run) for run in results.runs], {}, {})
    heads = ["against", "proxy reward", "true reward", "diversity", "sharpness", "lpips diversity", "UNet evals, ratio"]
    assert table(found, "", "differences")[0] == heads


def test_tuning_says_what_it_guarded(results):
    def said(**scores: list[float]) -> str:
        points = [
            Point(step, {"proxy_reward": 1.0, **{name: both[step] for name, both in scores.items()}}, {}, {})
            for step in (0, 1)
        ]
        choices = {"sqdf": choose([Trial({}, Curve(0, points)), Trial({}, None)], results.protocol.tuning)}
        return tuning_sentence(replace(results, choices=choices))

    guarded = "Chosen: the highest last proxy reward of those that keep 90% of the base model's alignment. The true"
    assert said(alignment=[1.0, 1.0]).startswith(guarded)
    assert said().startswith("Chosen: the highest last proxy reward of all; nothing could be guarded. The true")
    # No trial has ended yet.
    assert tuning_sentence(replace(results, choices={})).startswith(guarded)


@pytest.mark.parametrize(
    ("better", "fronts"),
    # Points that nothing beats: diversity falls with the proxy reward and the true reward rises, so that where the one
    # has a front the other has a single point, of which none is drawn. A high reward is out of sight when it is bad.
    [("higher", {"diversity": 3}), ("lower", {"true_reward": 5}), ("neither", {})],
)
def test_plots_know_which_direction_of_a_judge_is_good(results, better, fronts):
    directions = dict.fromkeys(("diversity", "true_reward"), better)
    judged = [replace(run, curves=[replace(one, better=directions) for one in run.curves]) for run in results.runs]
    drawn = figures(replace(results, runs=judged), "")
    for score in directions:
        lines = drawn[f"methods_{score}_against_proxy_reward"].axes.lines
        widest = [line for line in lines if line.get_linewidth() == 7]
        assert [len(line.get_xdata()) for line in widest] == ([fronts[score]] if score in fronts else [])


def test_json_holds_it_all(results, folder):
    found = json.loads(write_results(results, folder).read_text())
    assert [method["label"] for method in found["methods"]][:2] == ["sqdf", "draft-1"]
    assert found["equal_reward"]["methods"] == {
        "proxy_reward": 2.0,
        "set_by": "draft-1",
        "does_not_set_it": ["asleep"],
    }
    run = found["methods"][0]["runs"][1]
    assert (run["seed"], run["folder"]) == (1, "runs/sqdf/seed-1")
    assert run["equal_reward_between"] == {"evaluation": 0, "weight": 1.0}
    assert run["curve"][2]["scores"]["true_reward"] == 3.0
    assert found["methods"][3]["unfinished"] == {"0": "no <light>", "1": "no light"}
    assert found["tuning"]["sqdf"]["chosen"] == 0
    assert found["duels"][0]["difference"]["true_reward"]["mean"] == pytest.approx(0.5)


@pytest.mark.slow
def test_the_page_nests_and_asks_the_network_for_nothing(results, folder):
    source = write_page(results, folder).read_text(encoding="utf-8")
    page = Page(source)
    text = " ".join(page.words)
    assert all(address.startswith("data:") for address in page.addresses)
    # Base model, sqdf and draft-1 reach the level, and twice that in the ablation.
    assert sum(address.startswith("data:image") for address in page.addresses) == 2 * (3 + 3)
    assert "Ablation: gamma" in text
    assert "no <light>" in text
    assert "4 methods under one budget" in text
    assert "The true reward has no say." in text
    sheet = Image.open(folder / "plots" / "methods_pictures_at_equal_reward.png")
    # Rows: the base model's images are black, sqdf's at equal reward grey, draft-1's, at its end, white.
    assert [sheet.getpixel((240, 40 + 48 + 102 * row)) for row in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    # Each plot of the page is a file in both formats too.
    names = {name for group in results.groups for name in figures(results, group)}
    assert len(names) == 10
    for kind in ("svg", "png"):
        assert {path.stem for path in (folder / "plots").glob(f"*.{kind}") if "pictures" not in path.stem} == names
    assert source.count("<svg") == len(names)


def test_a_page_without_any_finished_run(results, folder):
    empty = [replace(run, curves=[], folders=[], unfinished={0: "not run yet"}) for run in results.runs[:2]]
    found = make_results(results.protocol, empty, {}, {})
    page = Page(write_page(found, folder).read_text(encoding="utf-8"))
    assert "Fewer than two methods have finished runs." in " ".join(page.words)
    assert "sqdf: not run yet\n" in as_text(found)
