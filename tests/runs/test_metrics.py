from __future__ import annotations

import json
import resource
import signal

import pytest

from sqdf_fast.errors import UserError
from sqdf_fast.runs import MetricsLog, read_metrics


def record(step: int, **values) -> dict:
    return {"kind": "step", "step": step, "loss": 0.1 * step, **values}


def test_lines_are_readable_before_the_log_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(record(1, kl_by_index={"3": 0.5}, eval_true_reward=None))
        assert read_metrics(path) == [record(1, kl_by_index={"3": 0.5}, eval_true_reward=None)]
        log.append(record(2))
        assert len(path.read_text().splitlines()) == 2
    assert [line["loss"] for line in read_metrics(path)] == [0.1, 0.2]


def test_append_goes_on_where_a_closed_log_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with MetricsLog(path) as log:
            log.append(record(step))
    assert read_metrics(path) == [record(1), record(2)]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_cut_last_line_is_left_out_and_then_cut_off(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3))
    path.write_text(whole[: -1 - cut])
    assert read_metrics(path) == [record(1), record(2)]
    with MetricsLog(path) as log:
        log.append(record(3))
    assert path.read_text() == whole


def test_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)))
    with MetricsLog(path) as log:
        log.append(record(2))
    assert read_metrics(path) == [record(1), record(2)]


def test_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damaged in ("{broken", "[1]", '{"kind": "step"}', '{"step": "1"}'):
        path.write_text(json.dumps(record(1)) + f"\n{damaged}\n" + json.dumps(record(3)) + "\n")
        with pytest.raises(UserError, match="line 2 is damaged; delete that line"):
            read_metrics(path)


def test_truncate_drops_what_lies_beyond_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append(record(step))
        log.append({"kind": "evaluation", "step": 2, "eval_proxy_reward": 1.0})
        log.truncate(2, 2)
        log.append(record(3, again=True))
    assert [(line["kind"], line["step"]) for line in read_metrics(path)] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
    ]
    assert read_metrics(path)[-1]["again"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"grad_norm": float("inf")}, "grad_norm is inf"),
        ({"kl_by_index": {"7": float("nan")}}, r"kl_by_index\.7 is nan"),
        ({"losses": [0.0, float("-inf")]}, r"losses\[1\] is -inf"),
    ],
)
def test_not_a_number_is_refused_and_leaves_the_file_intact(tmp_path, values, key):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(record(1))
        with pytest.raises(UserError, match=f"{key} at step 2: the run has diverged"):
            log.append(record(2) | values)
        log.append(record(3))
    assert read_metrics(path) == [record(1), record(3)]


def test_full_disk_is_one_clear_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with MetricsLog(path) as log:
            log.append(record(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
            with pytest.raises(UserError, match=r"cannot be written .*free some space"):
                log.append(record(2))
            with pytest.raises(UserError, match=r"cannot be written .*free some space"):
                log.append(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_metrics(path) == [record(1)]


def test_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        MetricsLog(tmp_path / "gone" / "metrics.jsonl")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_truncate_drops_an_evaluation_that_the_checkpoint_does_not_know(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for record in (
            {"kind": "evaluation", "step": 0},
            {"kind": "step", "step": 1},
            {"kind": "step", "step": 2},
            {"kind": "evaluation", "step": 2},
        ):
            log.append(record)
        log.truncate(2, 0)
    assert [(line["kind"], line["step"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
    ]
