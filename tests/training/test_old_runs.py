"""A run that version 0.1.0 began before settings were renamed goes on as it would have."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sqdf_fast.runs import read_metrics
from sqdf_fast.training.lifecycle import continue_run

# Stopped after step 2 of 4: config.yaml, metrics.jsonl and a checkpoint with its replay buffer. expected.safetensors is
# the LoRA of the same run, uninterrupted, by that version.
RUN = Path(__file__).parent / "data" / "run_0_1"


def test_a_run_of_version_0_1_continues_to_the_same_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    continue_run(run)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"] == [1, 2, 3, 4]
    expected = load_file(run / "expected.safetensors")
    found = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Other processors round otherwise in the last bits.
        assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12), name
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)
