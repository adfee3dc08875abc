from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sqdf_fast.errors import UserError
from sqdf_fast.runs.trackers import Trackers, refuse_missing, scalars

CONFIG = {"seed": 3, "model": "shapes", "objective": {"alpha": 0.5}, "judges": ["clip"], "vram": None, "merge": True}
PROMPTS = ["a red star", "two blue rings, close together"]


def step(number: int) -> dict:
    return {
        "kind": "step",
        "step": number,
        "reward_mean": number / 2,
        "kl_mean": 0.25,
        "kl_by_index": {"3": 0.5, "11": 0.125},
        "joules": None,
        "stages": {"decode": {"seconds": 1.0}},
        "budget_event": "reward: 2 images at a time",
    }


def evaluation(number: int) -> dict:
    return {
        "kind": "evaluation",
        "step": number,
        "eval_proxy_reward": number + 0.5,
        "eval_kl": 0.75,
        "spent_unet_evaluations": 640,
        "better": {"vendi": "higher"},
        "by_prompt": {"proxy_reward": [1.0, 2.0]},
    }


def images(level: float) -> torch.Tensor:
    return torch.full((2, 3, 8, 6), level) * torch.tensor([1.0, 0.5])[:, None, None, None]


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "trackers" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def series(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log(trackers: Trackers, records: list[dict]) -> None:
    for record in records:
        trackers.log(record)
        if record["kind"] == "evaluation":
            trackers.log_images(record["step"], images(0.2 + record["step"] / 10), PROMPTS)


def test_scalars_of_a_record():
    assert scalars(step(4)) == {
        "train/reward_mean": 2.0,
        "train/kl_mean": 0.25,
        "kl/index_3": 0.5,
        "kl/index_11": 0.125,
    }
    assert scalars(evaluation(4)) == {
        "evaluation/proxy_reward": 4.5,
        "evaluation/kl": 0.75,
        "evaluation/spent_unet_evaluations": 640,
    }
    assert scalars({"kind": "alarm", "step": 4, "best_step": 2}) == {}


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    records = [evaluation(0), step(1), step(2), evaluation(2), {"kind": "end", "step": 2, "reason": "steps"}]
    trackers = Trackers.open(["tensorboard"], tmp_path, CONFIG, pytest.fail)
    log(trackers, records)
    trackers.close()

    events = read_back(tmp_path)
    wanted: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for tag, value in scalars(record).items():
            wanted.setdefault(tag, []).append((record["step"], value))
    assert {tag: series(events, tag) for tag in events.Tags()["scalars"]} == wanted

    tags = [f"samples/{index:02d} {prompt}" for index, prompt in enumerate(PROMPTS)]
    assert events.Tags()["images"] == tags
    for tag, factor in zip(tags, (1.0, 0.5), strict=True):
        drawn = events.Images(tag)
        assert [(image.step, image.width, image.height) for image in drawn] == [(0, 6, 8), (2, 6, 8)]
        assert [png(image.encoded_image_string) for image in drawn] == [round(51 * factor), round(102 * factor)]


def png(data: bytes) -> int:
    """The one level of an image of one color."""
    (level,) = np.unique(np.asarray(Image.open(io.BytesIO(data))))
    return int(level)


def test_a_resumed_run_replaces_what_the_killed_one_logged_beyond_its_checkpoint(tmp_path):
    killed = Trackers.open(["tensorboard"], tmp_path, CONFIG, pytest.fail)
    log(killed, [evaluation(0), step(1), step(2), step(3), evaluation(3)])
    killed.close()
    resumed = Trackers.open(["tensorboard"], tmp_path, CONFIG, pytest.fail, resumed_step=1)
    log(resumed, [step(2)])
    resumed.close()

    events = read_back(tmp_path)
    assert series(events, "train/reward_mean") == [(1, 0.5), (2, 1.0)]
    assert series(events, "evaluation/proxy_reward") == [(0, 0.5)]
    assert [image.step for image in events.Images("samples/00 a red star")] == [0]
    # The settings are stored once.
    (settings,) = (tmp_path / "trackers" / "tensorboard").glob("*/hparams.yml")
    assert "objective.alpha: 0.5" in settings.read_text()
    assert "judges: '[''clip'']'" in settings.read_text()


def test_a_tracker_that_fails_is_dropped_with_one_message():
    said, kept, lost = [], Recorder(), Recorder(fails_at=2)
    trackers = Trackers([lost, kept], said.append)
    log(trackers, [step(1), step(2), step(3)])
    trackers.close()
    assert said == ["recorder failed and receives no more data of this run: OSError: no route to host"]
    assert (lost.steps, lost.finished) == ([1], False)
    assert (kept.steps, kept.finished) == ([1, 2, 3], True)


class Recorder:
    name = "recorder"

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.finished, self.fails_at = False, fails_at

    def log(self, values: dict, step: int) -> None:
        if step == self.fails_at:
            raise OSError("no route\nto host")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


class Server(types.ModuleType):
    """What a run does with the packages wandb and trackio, written down."""

    class Image:
        def __init__(self, data: np.ndarray, caption: str) -> None:
            self.shape, self.caption = data.shape, caption

    def __init__(self, name: str, refuses: bool = False) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls: list = []
        self.config = types.SimpleNamespace(update=lambda values, **_: self.calls.append(("config", values)))
        self.refuses = refuses

    def init(self, **options) -> Server:
        if self.refuses:
            raise RuntimeError("no API key configured.\nUse `wandb login`")
        self.calls.append(("init", options))
        return self

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_server_gets_images_with_captions_and_a_resumed_run_keeps_its_name(tmp_path, monkeypatch, name):
    server = Server(name)
    monkeypatch.setitem(sys.modules, name, server)
    run = tmp_path / "shapes-taste-001"
    trackers = Trackers.open([name], run, CONFIG, pytest.fail)
    log(trackers, [evaluation(0), step(1)])
    trackers.close()
    (_, first), (_, settings), (_, _, scores), (_, zero, drawn), (_, one, trained), end = server.calls
    assert first["project"] == "sqdf-fast"
    assert first["resume"] == "allow"
    assert settings["objective.alpha"] == 0.5
    assert scores["evaluation/proxy_reward"] == 0.5
    assert (zero, one, trained["train/reward_mean"], end) == (0, 1, 0.5, ("finish",))
    assert [(tag, image.caption, image.shape) for tag, image in drawn.items()] == [
        (f"samples/{index:02d}", prompt, (8, 6, 3)) for index, prompt in enumerate(PROMPTS)
    ]

    server.calls.clear()
    Trackers.open([name], run, CONFIG, pytest.fail, resumed_step=1)
    assert server.calls == [("init", first)]
    Trackers.open([name], tmp_path / "shapes-taste-002", CONFIG, pytest.fail)
    assert server.calls[1][1] != first


def test_what_cannot_be_tracked_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Server("wandb", refuses=True))
    with pytest.raises(UserError, match=r"wandb does not start \(RuntimeError: no API key configured\. Use") as error:
        Trackers.open(["wandb"], tmp_path, CONFIG, pytest.fail)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'aim' is unknown; allowed: tensorboard, wandb, trackio"):
        refuse_missing(["tensorboard", "aim"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackio is not installed; run `pip install trackio` or leave it out"):
        refuse_missing(["trackio"])
