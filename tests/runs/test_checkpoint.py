from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.files import atomic_folder
from sqdf_fast.runs.checkpoint import checkpoints, read_checkpoint, save_checkpoint, step_of

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(3, dtype=torch.int64)}


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, 12, TENSORS, {"refills": 2})
    tensors, values = read_checkpoint(path)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert torch.equal(tensors["b"], TENSORS["b"])
    assert values == {"refills": 2, "step": 12}
    assert step_of(path) == 12


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000015", "step_000100"]


def test_order_is_by_step_and_strangers_are_left_alone(tmp_path):
    (tmp_path / "step_000050.bak").mkdir()
    for step in (1_000_000, 999_999):
        save_checkpoint(tmp_path, step, TENSORS, {})
    assert [step_of(path) for path in checkpoints(tmp_path)] == [999_999, 1_000_000]
    assert checkpoints(tmp_path / "absent") == []


def test_a_failed_save_leaves_the_old_one(tmp_path):
    save_checkpoint(tmp_path, 5, TENSORS, {"mark": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 5, TENSORS, {"mark": object()})
    assert read_checkpoint(tmp_path / "step_000005")[1]["mark"] == 1
    assert os.listdir(tmp_path) == ["step_000005"]


@pytest.mark.parametrize("fault", ["flip", "cut", "missing tensors", "missing values", "json"])
def test_damage_is_found(tmp_path, fault):
    path = save_checkpoint(tmp_path, 5, TENSORS, {})
    tensors, values = path / "state.safetensors", path / "state.json"
    data = bytearray(tensors.read_bytes())
    if fault == "flip":
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif fault == "cut":
        tensors.write_bytes(data[:-4])
    elif fault == "missing tensors":
        tensors.unlink()
    elif fault == "missing values":
        values.unlink()
    else:
        values.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="step_000005 is damaged"):
        read_checkpoint(path)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_stays(tmp_path):
    # A file-size limit makes the kernel refuse the write, as a full disk does.
    script = f"""
import resource, torch
from pathlib import Path
from sqdf_fast.runs.checkpoint import save_checkpoint
from sqdf_fast.errors import UserError
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, 1, {{"a": torch.zeros(4)}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(folder, 2, {{"a": torch.zeros(100_000)}}, {{}})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "step_000002: cannot be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["step_000001"]


def test_atomic_folder_replaces(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "x") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "x") == ["two"]
