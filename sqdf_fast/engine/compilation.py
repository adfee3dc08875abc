"""Regional compilation: the repeated blocks of a network through torch.compile, only while it samples.

A whole UNet takes minutes to compile and falls apart at every adapter; its repeated blocks share a few graphs. Training
keeps the uncompiled blocks: its checkpointed and its roles switch Python state that a graph would have to guard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sqdf_fast.errors import UserError

Compilation = Literal["none", "regional", "cuda-graphs"]


class CompiledBlocks:
    """The blocks of a network whose class name is in ``kinds``, compiled at their first call inside :meth:`active`.

    Shapes are static: another batch size is another graph, compiled when it first appears.

    Args:
        network: searched; nothing of it changes outside :meth:`active`.
        kinds: class names.
        options: of torch.compile, such as mode or backend.

    Raises:
        UserError: no such block.
    """

    def __init__(self, network: nn.Module, kinds: Collection[str], **options: Any) -> None:
        self._blocks = [block for block in network.modules() if type(block).__name__ in kinds]
        if not self._blocks:
            raise UserError(
                f"sampling.compile: this network has no block of class {', '.join(sorted(kinds))}; "
                "set sampling.compile=none"
            )
        self._calls = []
        for block in self._blocks:
            block.compile(dynamic=False, **options)
            self._calls.append(block._compiled_call_impl)
            block._compiled_call_impl = None

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the blocks run compiled inside. Raises UserError when they cannot be compiled."""
        try:
            for block, call in zip(self._blocks, self._calls, strict=True):
                block._compiled_call_impl = call
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"sampling.compile: torch.compile fails here ({reason}); set sampling.compile=none"
            ) from error
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None


def repeated_kinds(network: nn.Module, otherwise: Collection[str]) -> Collection[str]:
    """The blocks that diffusers compiles one by one in this network, ``otherwise`` where it names none (SD3)."""
    return getattr(network, "_repeated_blocks", None) or otherwise


def compile_options(compilation: Compilation, device: torch.device) -> dict[str, Any]:
    """Options of torch.compile for a setting other than "none".

    Raises:
        UserError: CUDA graphs without CUDA.
    """
    if compilation == "regional":
        return {}
    if device.type != "cuda":
        raise UserError(
            f"sampling.compile = cuda-graphs on {device}; CUDA graphs need a CUDA device, "
            "here 'none' and 'regional' are allowed; set sampling.compile=regional"
        )
    return {"mode": "reduce-overhead"}
