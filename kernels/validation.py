"""Checks of the arguments of public ops: shapes, dtypes and devices, never values (which would wait for the GPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from sqdf_fast.errors import UserError


def math_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Precision of an op's arithmetic: float64 if any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is floating point and on the device of the first."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise UserError(f"{op}: {name} is {tensor.dtype}; pass a floating-point tensor")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise UserError(f"{op}: {name} is on {tensor.device}, {first} on {device}; move them to one device")


def check_network_output(op: str, name: str, output: Tensor, x: Tensor, guidance_scale: float) -> None:
    """A network output is [2B, ...] ordered [uncond; cond] under guidance, [B, ...] without."""
    batch, *sample = x.shape
    expected = [batch if guidance_scale == 1 else 2 * batch, *sample]
    if list(output.shape) != expected:
        layout = "[B, ...]" if guidance_scale == 1 else "[2B, ...] ordered [uncond; cond]"
        raise UserError(
            f"{op}: {name} has shape {tuple(output.shape)}; with x {tuple(x.shape)} "
            f"and guidance_scale={guidance_scale:g} it must be {layout} = {tuple(expected)}"
        )


def check_table(op: str, name: str, table: Tensor, columns: int, index: Tensor, x: Tensor) -> None:
    """A coefficient table is [T, columns], and the index int64 [B], both on the device of x."""
    if table.ndim != 2 or table.shape[1] != columns or table.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"{op}: {name} is {table.dtype} {tuple(table.shape)}; "
            f"it must be float32 or float64 [T, {columns}], as in DenoisingSchedule"
        )
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise UserError(f"{op}: index is {index.dtype} {tuple(index.shape)}; it must be int64 [{x.shape[0]}]")
    if table.device != x.device or index.device != x.device:
        raise UserError(
            f"{op}: x is on {x.device}, {name} on {table.device}, index on {index.device}; "
            "move them to one device (schedule.to(device))"
        )


def check_batch(op: str, **tensors: Tensor) -> None:
    """Each tensor has a batch axis and at least one element per sample."""
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() == 0:
            shape = tuple(tensor.shape)
            raise UserError(f"{op}: {name} has shape {shape}; it must be [B, ...] with at least one element per sample")


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph: gradients reach the documented inputs only."""
    return tensor.detach() if tensor.requires_grad else tensor
