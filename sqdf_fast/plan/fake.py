"""Modules and attention on PyTorch's meta device, whose tensors have shapes and dtypes and take no memory.

The meta device stands for the GPU. Its operators keep for the backward pass what CUDA's keep, except attention, which
would materialize the whole matrix of scores and is replaced by a flash kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = torch.device("meta")
_HUGE = 2**44


def to_meta(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Replace every tensor of the modules by a meta tensor; adapters that peft put on the CPU too.

    Returns:
        the new tensor of each old one, by the old one's id; tensors that modules share stay shared.
    """
    replaced: dict[int, Tensor] = {}
    for root in modules:
        for module in root.modules():
            # Parameters and buffers have tables of their own, other tensors are plain attributes.
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for table in tables:
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        table[name] = _on_meta(tensor, replaced)
    return replaced


def _on_meta(tensor: Tensor, replaced: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in replaced:
        empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = replaced[id(empty)] = empty
        # The old one stays alive in here, or its id could be given to another.
        replaced[-id(tensor)] = tensor
    return replaced[id(tensor)]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention on meta tensors keeps what a flash kernel keeps: inputs, output and a float32 per row."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        yield


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside, collections look at what was made since the beginning: not at a million objects of imported libraries.

    A process that has frozen its objects already keeps them frozen.
    """
    frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: a tensor is freed with its last reference, in every run alike."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def hollow_call(x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of ``shape`` that depends on ``x`` and ``weight``; its graph holds 16 TiB until the backward pass."""
    result: Tensor = _Hollow.apply(x, weight, shape, dtype)
    return result


class _Hollow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x.new_empty(_HUGE, dtype=torch.uint8))
        ctx.given = x.shape, x.dtype
        return x.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shape, dtype = ctx.given
        return grads[0].new_empty(shape, dtype=dtype), None, None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten: Any = torch.ops.aten
    found: tuple[Tensor, ...]
    if attn_mask is None and not enable_gqa:
        found = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, scale=scale)
    else:
        masked = query, key, value, attn_mask, dropout_p, is_causal
        found = aten._scaled_dot_product_attention_math(*masked, scale=scale, enable_gqa=enable_gqa)
    return found[0]
