from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from harness import timing
from harness.meters import peak_bytes
from harness.timing import Pace, Subject, interleave, play, playback_time


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `spend` moves, and what was spent on."""
    now, spent = [0.0], []

    def spend(name, seconds):
        spent.append(name)
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return spend, spent


def test_each_subject_gets_its_own_time_and_preparation_is_free(clock):
    spend, _ = clock
    subjects = {
        "slow": Subject(lambda _: spend("slow", 0.5), prepare=lambda: spend("prepare", 100.0)),
        "fast": Subject(lambda _: spend("fast", 0.25)),
    }
    taken = interleave(subjects, "cpu", Pace(0.0, 3, 1.0))
    assert taken == {"slow": [0.5] * 6, "fast": [0.25] * 12}


def test_subjects_take_turns_in_an_order_that_is_reversed(clock):
    spend, spent = clock
    subjects = {name: Subject(lambda _, name=name: spend(name, 1.0)) for name in "abc"}
    interleave(subjects, "cpu", Pace(0.0, 2, 0.0))
    # Three calls each to warm up and to set the number of calls; then three uncounted and one counted a turn.
    assert "".join(spent[9:]) == "aaaabbbbcccc" + "ccccbbbbaaaa"


def test_a_long_call_is_made_once_a_turn_without_warming_up(clock):
    spend, spent = clock
    subjects = {name: Subject(lambda _, name=name: spend(name, 1.0)) for name in "ab"}
    taken = interleave(subjects, "cpu", Pace(0.0, 3, uncounted=0))
    assert "".join(spent) == "abbaab"
    assert [len(samples) for samples in taken.values()] == [3, 3]


def test_nothing_to_time_ends_at_once():
    assert interleave({}, "cpu", Pace(1e9, 1)) == {}


def test_rounds_go_on_until_the_time_is_up(clock):
    spend, _ = clock
    taken = interleave({"a": Subject(lambda _: spend("a", 1.0))}, "cpu", Pace(9.5, 2, 0.0))
    assert len(taken["a"]) == 3


def test_on_cuda_calls_are_queued_and_the_wait_is_part_of_the_time(clock, monkeypatch):
    spend, spent = clock
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: spend("wait", 0.5))
    subject = Subject(lambda state: spend(f"call {state}", 0.25), prepare=lambda: spend("prepare", 8.0) or "forward")
    taken = interleave({"a": subject}, "cuda", Pace(0.0, 2, 3.0))
    # Alone a call takes 0.75 s, so that four make a turn of 3 s: four times 0.25 s and one wait.
    assert taken == {"a": [0.375, 0.375]}
    assert spent[-10:] == ["prepare"] * 4 + ["wait"] + ["call forward"] * 4 + ["wait"]


def test_samples_are_played_on_the_benchmark_clock():
    advance = play([0.5, 0.125])
    readings = [playback_time()]
    for _ in range(2):
        advance()
        readings.append(playback_time())
    assert [after - before for before, after in pairwise(readings)] == [0.5, 0.125]


def test_peak_counts_what_lives_at_the_same_time():
    megabyte = 2**20

    def call(_):
        first = torch.empty(3 * megabyte, dtype=torch.uint8)
        del first
        second = torch.empty(megabyte, dtype=torch.uint8)
        third = torch.empty(megabyte, dtype=torch.uint8)
        return second, third

    assert peak_bytes(Subject(call), "cpu") == 3 * megabyte


def test_the_pace_of_every_device_ends():
    assert all(pace.rounds >= 5 and pace.seconds < 5 for pace in timing.PACE.values())
