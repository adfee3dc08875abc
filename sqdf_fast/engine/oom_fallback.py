"""Out-of-memory fallback: what an optimizer step gives up, one setting at a time, in the stage that ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sqdf_fast.config import Execution

_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # no algorithm's workspace fits
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or one that it was raised from, says that memory ran out, by its type or its text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # The driver, cuBLAS, cuDNN and the CPU's allocator raise RuntimeError.
    named = isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    return named or (error.__cause__ is not None and out_of_memory(error.__cause__))


@contextmanager
def normalize_oom_errors() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for any out-of-memory error inside, even a wrapped one; also a decorator."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def next_fallback(execution: Execution, stage: str) -> tuple[Execution, str] | None:
    """The next smaller execution for a step that ran out of memory in ``stage``, and what was given up; None: nothing.

    First the chunks of that stage are halved, then its blocks are checkpointed, then the staged executor replaces the
    joint graph, then frozen weights are offloaded between their stages. The gradient changes by rounding only.

    Args:
        stage: of an executor, or the trainer's "optimizer", when no graph is alive.
    """
    return next(_fallbacks(execution, stage), None)


def offloaded(execution: Execution) -> tuple[Execution, str] | None:
    """``execution`` with frozen weights offloaded between their stages; None where they are, or cannot be (int8)."""
    if execution.offload == "staged" or execution.quantization == "int8":
        return None
    return execution.model_copy(update={"offload": "staged"}), "frozen weights offloaded between their stages"


def _fallbacks(execution: Execution, stage: str) -> Iterator[tuple[Execution, str]]:
    if stage != "optimizer":
        yield from _smaller_graphs(execution, stage)
    if execution.executor == "joint":
        # Its chunks were not chosen for this memory.
        smallest = {"executor": "staged", "forward_batch_rows": 2, "backward_batch_rows": 1, "decode_images": 1}
        yield execution.model_copy(update=smallest), "joint graph -> staged"
    if (lower := offloaded(execution)) is not None:
        yield lower


def _smaller_graphs(execution: Execution, stage: str) -> Iterator[tuple[Execution, str]]:
    if execution.executor == "joint":
        yield from _halved(execution, "micro_batch")
        yield from _checkpointed(execution, ("network", "decoder", "reward"))
        return
    chunk = {"transition": "forward_batch_rows", "look-ahead": "forward_batch_rows", "reward": "decode_images"}
    yield from _halved(execution, chunk.get(stage, "backward_batch_rows"))
    if stage == "reward":
        yield from _checkpointed(execution, ("decoder", "reward"))
    elif stage.endswith("vjp"):
        yield from _checkpointed(execution, ("network",))


def _halved(execution: Execution, name: str) -> Iterator[tuple[Execution, str]]:
    value = getattr(execution, name)
    if value > 1:
        yield execution.model_copy(update={name: value // 2}), f"{name} {value} -> {value // 2}"


def _checkpointed(execution: Execution, parts: tuple[str, ...]) -> Iterator[tuple[Execution, str]]:
    missing = tuple(part for part in parts if part not in execution.gradient_checkpointing)
    if missing:
        more = execution.model_copy(update={"gradient_checkpointing": (*execution.gradient_checkpointing, *missing)})
        yield more, f"gradient checkpointing of {' and '.join(missing)}"
