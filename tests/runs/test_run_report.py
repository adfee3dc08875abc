from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from sqdf_fast.errors import UserError
from sqdf_fast.runs import (
    MetricsLog,
    read_run,
    read_samples,
    save_samples,
    summary_lines,
    write_environment,
    write_report,
)
from sqdf_fast.runs.run import Summary

PROMPTS = ["a red star", "<script>alert('x')</script> & \"more\""]
CONFIG = {
    "preset": "shapes",
    "model": "some/<model>",
    "reward": "taste",
    "steps": 40,
    "seed": 7,
    "objective": {"alpha": 3.0, "gamma": 0.9, "mask_nonpositive": False},
    "policy": {"target_modules": ["to_q", "to_k"], "alpha": None},
}


def evaluation(step: int, proxy: float, true: float | None, **more) -> dict:
    found = {
        "kind": "evaluation",
        "step": step,
        "eval_proxy_reward": proxy,
        "eval_proxy_reward_std": 0.5,
        "eval_true_reward": true,
        "eval_alignment": 0.8,
        "eval_alignment_shuffled": 0.1,
        "eval_attribute_accuracy": 0.9 - 0.001 * step,
        "eval_diversity": 1.4 - 0.007 * step,
        "seconds": 5.0,
    }
    return found | more


def step_record(step: int) -> dict:
    return {
        "kind": "step",
        "step": step,
        "reward_mean": 0.1 * step,
        "reward_std": 0.3,
        "kl_mean": 0.01,
        "kl_by_index": {str(step % 5): 0.01 * (step % 5)},
        "loss": -0.1 * step,
        "grad_norm": 0.5,
        "seconds": 2.0,
        "unet_evaluations": 150,
        "memory_bytes": 2**30 + step,
    }


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A finished run of 40 steps, evaluated at 0, 20 and 40."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_environment(folder)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.append(evaluation(0, 0.25, -1.0))
        for step in range(1, 41):
            log.append(step_record(step))
            if step % 20 == 0:
                log.append(evaluation(step, 0.25 + step / 40, -1.0 + step / 100))
        log.append({"kind": "end", "step": 40, "reason": "steps"})
    for step in (0, 20, 40):
        images = torch.full((2, 3, 16, 16), step / 40)
        images[1] = 0.5
        save_samples(folder, step, images, PROMPTS, [11, 12])
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects text and addresses."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_page_holds_everything_and_asks_the_network_for_nothing(run_folder):
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert all(address.startswith("data:") for address in page.addresses)
    # A plot clips to a shape of its own, "#p...".
    assert not re.search(r"url\((?!#p)|@import|https?://", source)
    assert "script" not in page.tags
    headings = [
        "Before and after",
        "Evaluation",
        "Training",
        "On the way",
        "Cost",
        "Configuration",
        "Environment",
    ]
    assert all(heading in page.text for heading in headings)
    # Before and after, on the way, and in the command that draws more.
    assert page.text.count("a red star") == 3
    assert f"sqdf-fast sample {run_folder} 'a red star' --seed 7" in page.text
    # No seed but the run's own, which a command takes.
    assert set(re.findall(r"seed \w+", page.text)) == {"seed 7"}
    assert "<script>alert('x')</script> & \"more\"" in page.text
    assert page.tags.count("svg") == 9
    # Two prompts before and after, and the same at three steps.
    assert page.tags.count("img") == 4 + 6


def test_evaluation_says_which_prompts_and_which_diversity(run_folder):
    assert "The prompts of the training; the same noise" in write_report(run_folder).read_text(encoding="utf-8")
    config = CONFIG | {"prompts": "shapes", "evaluation": {"prompts": "shapes-held-out"}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps(evaluation(step, 0.0, 0.0, diversity_measure="<thumbnails>")) for step in (0, 1)]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines))
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "The prompts of shapes-held-out, which training never used; the same noise" in text
    assert "Diversity of <thumbnails>" in text


def test_headline_numbers(run_folder):
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "+2.00 sd" in text
    assert "+0.40" in text
    assert "96%" in text
    assert "80%" in text
    assert "shuffled prompts 0.10" in text
    assert "rose by 2.00 standard deviations" in text
    assert "6,000" in text
    assert "1 min 20 s" in text
    assert "40 of 40 steps" in text
    assert "partial" not in text


def test_a_run_that_its_limit_ended_says_so(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().replace('"reason": "steps"', '"reason": "limit"')
    (run_folder / "metrics.jsonl").write_text(lines)
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "40 steps, ended by its limit" in text
    assert "partial" not in text


def test_images_are_the_samples_in_order(run_folder):
    source = write_report(run_folder).read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', source)
    levels = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))[0] for data in images]
    assert levels == [0, 255, 128, 128, 0, 128, 255, 128, 128, 128]


def test_large_images_are_scaled_down(run_folder):
    Image.new("RGB", (1024, 512), (9, 200, 30)).save(run_folder / "samples/step_000000/00.png")
    source = write_report(run_folder).read_text(encoding="utf-8")
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", source)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (384, 192)


def test_interrupted_run_without_evaluation(run_folder):
    lines = [json.dumps(step_record(step)) for step in (1, 2, 3)]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "step", "st')
    for image in (run_folder / "samples").glob("step_0000[24]0/*"):
        image.unlink()
    (run_folder / "samples/step_000020").rmdir()
    (run_folder / "samples/step_000040").rmdir()
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert "partial run: 3 of 40 steps" in page.text
    assert "No evaluation after training yet" in page.text
    assert "drawn no later ones yet" in page.text
    assert page.tags.count("svg") == 5
    assert page.tags.count("img") == 2


def test_run_that_has_only_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("model: shapes\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "partial run: 0 steps" in page.text
    assert "svg" not in page.tags
    assert "img" not in page.tags


def test_missing_and_damaged_images_leave_a_gap(run_folder):
    (run_folder / "samples/step_000040/00.png").unlink()
    (run_folder / "samples/step_000040/01.png").write_bytes(b"\x89PNG cut")
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 10 - 4
    assert page.words.count("missing") == 4


def test_world_without_a_true_reward(run_folder):
    lines = []
    for record in read_run(run_folder).evaluations:
        unknown = dict.fromkeys(
            ("eval_true_reward", "eval_alignment", "eval_alignment_shuffled", "eval_attribute_accuracy")
        )
        lines.append(json.dumps(record | unknown))
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert "true reward" not in page.text
    assert page.tags.count("svg") == 2
    assert "rose by 2.00 standard deviations" in page.text


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (
            (1.25, -0.6),
            "rose by 2.00 standard deviations of the base model's, and the true reward.*rose by 0.40",
        ),
        ((1.25, -3.0), "rose by 2.00 .*, but the true reward fell by 2.00: it was over-optimized"),
        ((0.0, -0.5), r"did not rise \(-0.50 standard deviations"),
        ((1.25, None), r"rose by 2.00 standard deviations of the base model's\.$"),
    ],
)
def test_verdict(after, sentence):
    assert re.search(sentence, Summary([evaluation(0, 0.25, -1.0), evaluation(9, *after)]).verdict)


def test_summary_compares_last_with_first():
    found = Summary([evaluation(0, 0.25, -1.0), evaluation(20, 9.0, 9.0), evaluation(40, 0.75, 0.5)])
    assert found.proxy_gain == pytest.approx(1.0)
    assert found.true_gain == pytest.approx(1.5)
    assert found.accuracy_kept == pytest.approx(0.86 / 0.9)
    assert found.diversity_kept == pytest.approx(0.8)
    assert found.shuffled == 0.1
    assert Summary([]).proxy_gain is None
    assert Summary([evaluation(0, 0.25, -1.0)]).proxy_gain is None
    assert Summary([evaluation(0, 1.0, 0.0, eval_proxy_reward_std=0.0), evaluation(1, 2.0, 0.0)]).proxy_gain is None


def test_summary_lines(run_folder):
    lines = summary_lines(read_run(run_folder))
    assert "(+2.00 base standard deviations)" in lines[1]
    assert lines[2].split() == ["true", "reward", "-1.000", "->", "-0.600", "(+0.400)"]
    assert "(80% kept)" in lines[4]
    assert "(shuffled prompts 0.100)" in lines[5]
    assert (
        "40 optimizer steps, 1 min 20 s training time, 15 s evaluation time, 6,000 UNet evaluations, 1.00 GiB"
        in lines[6]
    )


def test_not_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="gone: does not exist; give the folder"):
        write_report(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is not a run folder \(no config\.yaml\)"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("[1, 2")
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("just text")
    with pytest.raises(UserError, match="expected a mapping"):
        write_report(tmp_path)


def test_samples_are_read_back(run_folder):
    samples = read_samples(run_folder)
    assert samples.prompts == PROMPTS
    assert samples.seeds == [11, 12]
    assert list(samples.steps) == [0, 20, 40]
    assert samples.steps[20][1] == run_folder / "samples/step_000020/01.png"
    (run_folder / "samples/samples.json").write_text("[{")
    assert read_samples(run_folder).steps == {}


def test_a_restored_run_is_judged_by_the_weights_it_left(run_folder):
    settings = yaml.safe_load((run_folder / "config.yaml").read_text()) | {"monitor": {"action": "restore"}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    alarm = {"kind": "alarm", "step": 40, "reason": "alignment fell", "best_step": 20}
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    lines[-1:] = [json.dumps(alarm), json.dumps({"kind": "end", "step": 40, "reason": "monitor"})]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "40 steps, ended by its monitor" in text
    # The evaluation at step 20, not that at 40.
    assert "+1.00 sd" in text
