"""Bytes that kernels allocate beyond their inputs and outputs, where no dispatcher sees them.

On the CPU these are the scratch buffers of ATen's own kernels, as its sources allocate them (FlashAttentionKernel.cpp,
ConvolutionMM2d.cpp) and as the profiler reports oneDNN's reordered copies; tests hold float32 and float64 to the
profiler's events (a CPU converts bfloat16 inside and needs more). On CUDA they are the accumulators of FlashAttention-2
(flash_api.cpp of its repository) and the temporaries of an AdamW step of a bfloat16 parameter. cuDNN's convolutions are
taken to need none, as with channels_last on tensor cores; that, and cuBLAS's buffer, the reserve has to cover until a
GPU has measured it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

Workspace = Callable[[Any, tuple[Any, ...]], int]
_aten = torch.ops.aten
_KEY_SPLIT = 512
_FLASH_BLOCK = 128
_MKLDNN_SMALLEST = 20480


def on_cpu(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a CPU kernel holds beyond inputs and outputs, in PyTorch's present number of threads."""
    return _ON_CPU.get(func._overloadpacket, none)(*args)


def on_cuda(func: Any, args: tuple[Any, ...]) -> int:
    """The same for the CUDA kernel that takes its place."""
    return _ON_CUDA.get(str(func._overloadpacket), none)(*args)


def none(*_: Any) -> int:
    """No workspace at all: what the dispatcher sees is everything."""
    return 0


def _splits(query: Tensor, key: Tensor) -> tuple[int, int]:
    length = query.shape[-2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(_KEY_SPLIT, key.shape[-2])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    rows, columns = _splits(query, key)
    numbers = rows * columns + 2 * rows + rows * query.shape[-1]
    return torch.get_num_threads() * numbers * max(query.element_size(), 4)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    rows, columns = _splits(query, key)
    scratch = (torch.get_num_threads() * 2 * rows * columns + rows) * max(query.element_size(), 4)
    # The kernel wants [B, N, H, D].
    return scratch + (0 if grad.transpose(1, 2).is_contiguous() else grad.nbytes)


def _flash_backward(grad: Tensor, query: Tensor, *_: Any) -> int:
    *heads, length, width = query.shape
    rows = prod(heads) * -(-length // _FLASH_BLOCK) * _FLASH_BLOCK
    return 4 * rows * (-(-width // 32) * 32 + 1)


def _adamw(parameter: Tensor, gradient: Tensor, state1: Tensor, *_: Any) -> int:
    if parameter.dtype != torch.bfloat16:
        return 0
    # States of 8 bits: bitsandbytes' step on float32 copies, then rounded stochastically. Of 32 bits: our reference.
    return (24 if state1.dtype == torch.uint8 else 32) * parameter.numel()


def _output_positions(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> int:
    return prod(
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, pad, gap, kernel, step in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    )


def _columns(x: Tensor, weight: Tensor, positions: int, plain: bool) -> int:
    return 0 if plain else len(x) * weight[0].numel() * positions * x.element_size()


def _pointwise(weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    return all(n == 1 for n in (*weight.shape[2:], *stride)) and not any(padding)


def _channels_last(*tensors: Tensor) -> bool:
    return any(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors
    )


def _blocked(channels: int) -> int:
    """Channels in oneDNN's layout: whole vectors of float32."""
    width = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return -(-channels // width) * width


def _blocked_size(x: Tensor) -> int:
    return x.nbytes // x.shape[1] * _blocked(x.shape[1])


def _blocked_weight(weight: Tensor) -> int:
    outputs, inputs = weight.shape[:2]
    return weight.nbytes // (outputs * inputs) * _blocked(outputs) * _blocked(inputs)


def _through_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.dtype == torch.float64 or x.dim() != 4:
        return False
    wide = weight.shape[-1] > 3 and weight.shape[-2] > 3
    return x.dtype != torch.float32 or wide or len(x) > 1 or x.numel() > _MKLDNN_SMALLEST


def _convolution(*arguments: Any) -> int:
    x, weight, _, stride, padding, dilation, transposed, *_ = arguments
    if transposed or x.dim() != 4:
        return 0
    stride, padding, dilation = ([n[0], n[-1]] for n in (stride, padding, dilation))
    positions = _output_positions(x, weight, stride, padding, dilation)
    output = len(x) * len(weight) * positions * x.element_size()
    if not _through_onednn(x, weight):
        return _columns(x, weight, positions, _pointwise(weight, stride, padding))
    if _channels_last(x, weight):
        return 2 * weight.nbytes
    # Copies in the blocked layout are multiplied, then the result is copied back.
    blocked = output // len(weight) * _blocked(len(weight))
    return max(_blocked_size(x) + _blocked_weight(weight) + blocked - output, blocked)


def _convolution_backward(*arguments: Any) -> int:
    grad, x, weight, _, stride, padding, _, transposed, _, _, output_mask = arguments
    if transposed or x.dim() != 4:
        return 0
    if not _through_onednn(x, weight):
        plain = _pointwise(weight, [stride[0], stride[-1]], [padding[0], padding[-1]])
        return _columns(x, weight, prod(grad.shape[2:]), plain) if output_mask[1] else 0
    if _channels_last(x, grad, weight):
        return 2 * weight.nbytes
    # The weights' gradient comes second: only then does its output take room.
    later = weight.nbytes if output_mask[1] else 0
    blocked = _blocked_size(x)
    input_pass = 0
    if output_mask[0]:
        input_pass = max(_blocked_size(grad) + _blocked_weight(weight) + blocked - x.nbytes, blocked) - later
    weight_pass = blocked + _blocked_size(grad) if output_mask[1] else 0
    return max(input_pass, weight_pass)


_ON_CPU: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
}
# By name: the ops of this project exist once they are imported.
_ON_CUDA: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "sqdf_fast.adamw": _adamw,
}
