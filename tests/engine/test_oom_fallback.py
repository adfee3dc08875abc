from __future__ import annotations

import re

import pytest
import torch

from sqdf_fast.config import Execution
from sqdf_fast.engine.oom_fallback import next_fallback, normalize_oom_errors, out_of_memory
from sqdf_fast.errors import UserError


def descent(execution: Execution, stage: str) -> list[str]:
    given_up = []
    while (found := next_fallback(execution, stage)) is not None:
        execution, what = found
        given_up.append(what)
        assert len(given_up) < 20
    return given_up


def test_every_stage_gives_up_what_is_its_own_first():
    execution = Execution(forward_batch_rows=4, backward_batch_rows=2, decode_images=2)
    away = "frozen weights offloaded between their stages"
    assert descent(execution, "transition") == [
        "forward_batch_rows 4 -> 2",
        "forward_batch_rows 2 -> 1",
        away,
    ]
    assert descent(execution, "reward") == [
        "decode_images 2 -> 1",
        "gradient checkpointing of decoder and reward",
        away,
    ]
    assert descent(execution, "policy vjp") == ["backward_batch_rows 2 -> 1", "gradient checkpointing of network", away]
    # Only weights can make room for the update.
    assert descent(execution, "optimizer") == [away]
    joint = execution.model_copy(update={"executor": "joint"})
    assert descent(joint, "optimizer") == ["joint graph -> staged", away]


def test_a_joint_graph_is_taken_apart_last():
    execution = Execution(
        executor="joint",
        micro_batch=2,
        forward_batch_rows=32,
        backward_batch_rows=32,
        gradient_checkpointing=("decoder",),
    )
    assert descent(execution, "backward")[:3] == [
        "micro_batch 2 -> 1",
        "gradient checkpointing of network and reward",
        "joint graph -> staged",
    ]
    staged = execution.model_copy(update={"micro_batch": 1, "gradient_checkpointing": ("decoder", "network", "reward")})
    below, _ = next_fallback(staged, "backward")
    assert (below.executor, below.forward_batch_rows, below.backward_batch_rows, below.decode_images) == (
        "staged",
        2,
        1,
        1,
    )


@pytest.mark.parametrize("stage", ["transition", "reward", "policy vjp", "optimizer"])
def test_the_bottom(stage):
    smallest = Execution(
        forward_batch_rows=1,
        backward_batch_rows=1,
        decode_images=1,
        gradient_checkpointing=("network", "decoder", "reward"),
        offload="staged",
    )
    assert next_fallback(smallest, stage) is None


def wrapped(error: Exception) -> Exception:
    """As a reward's error arrives."""
    outer = UserError("reward 'mine' raised RuntimeError")
    outer.__cause__ = error
    return outer


NO_ROOM = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
]


@pytest.mark.parametrize("error", [*NO_ROOM, *map(wrapped, NO_ROOM)], ids=repr)
def test_every_librarys_way_to_run_out_of_memory_is_one_error(error):
    assert out_of_memory(error)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(str(error))), normalize_oom_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: out of memory"),
        UserError("out of memory with the smallest settings"),
        KeyboardInterrupt("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error):
    assert not out_of_memory(error)
    with pytest.raises(type(error)) as found, normalize_oom_errors():
        raise error
    assert found.value is error
