"""Regional compilation: torch.compile of a network's repeated blocks, only while it samples.

Whole networks take minutes to compile and break at every adapter; repeated blocks share a few graphs. Training runs
uncompiled: checkpointing and roles switch Python state that a graph would have to guard.
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
    """A network's blocks of the classes named ``kinds``, compiled at their first call inside :meth:`active`.

    Shapes are static: each batch size is compiled separately. ``options`` are those of torch.compile.

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
            raise UserError(f"sampling.compile: torch.compile failed ({reason}); set sampling.compile=none") from error
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None


def repeated_kinds(network: nn.Module, otherwise: Collection[str]) -> Collection[str]:
    """Classes of the blocks that diffusers compiles one by one in a network; ``otherwise`` without any (SD3)."""
    return getattr(network, "_repeated_blocks", None) or otherwise


def compile_options(compilation: Compilation, device: torch.device) -> dict[str, Any]:
    """Options of torch.compile for a setting other than "none". Raises UserError for CUDA graphs without CUDA."""
    if compilation == "regional":
        return {}
    if device.type != "cuda":
        raise UserError(
            f"sampling.compile = cuda-graphs needs a CUDA device, not {device}; set sampling.compile=regional or none"
        )
    return {"mode": "reduce-overhead"}
