"""Offload: frozen weights are on the device only in the stages that use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 512  # bytes, of the CUDA allocator's blocks


class Offload:
    """Keeps the frozen weights of named groups in host memory and uploads a group when a stage uses it.

    Frozen weights never change, so nothing is copied back. A group is one buffer, pinned for CUDA, and one asynchronous
    copy. Trained parameters stay where they are.

    Args:
        groups: modules by name, their weights on the device or still on the host; a shared tensor belongs to the first.
        device: where the stages run; a CPU works the same way, with copies in ordinary memory.
    """

    def __init__(self, groups: Mapping[Any, Iterable[nn.Module]], device: torch.device) -> None:
        seen: set[int] = set()
        self._groups = {name: PinnedWeights(_frozen(modules, seen), device) for name, modules in groups.items()}

    @property
    def resident(self) -> frozenset[str]:
        """Names of the groups whose weights are on the device."""
        return frozenset(name for name, group in self._groups.items() if group.on_device)

    def leave(self, *names: str) -> None:
        """Drop all other groups from the device."""
        for name, group in self._groups.items():
            if name not in names:
                group.drop()

    def use(self, *names: str) -> None:
        """Upload these groups, after dropping all others."""
        self.leave(*names)
        for name in names:
            self._groups[name].upload()


class PinnedWeights:
    """Tensors, and one buffer on the host with their contents; ``on_device``: whether all are on the device."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self.on_device = all(tensor.device == device for tensor in tensors)
        self._layouts, size = [], 0
        for tensor in tensors:
            self._layouts.append((size, tensor.dtype, tensor.shape, tensor.stride()))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        like = tensors[0].data if tensors and self.on_device and device.type != "cuda" else torch.empty(0)
        self._host = like.new_empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for tensor, view in zip(tensors, self._views(self._host), strict=True):
            view.copy_(tensor.data)
        if not self.on_device:
            self.drop()

    def drop(self) -> None:
        self.on_device = False
        for tensor in self._tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)

    def upload(self) -> None:
        if self.on_device:
            return
        buffer = self._host.to(self._device, copy=True, non_blocking=True)
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view
        self.on_device = True

    def _views(self, buffer: Tensor) -> Iterable[Tensor]:
        for offset, dtype, shape, stride in self._layouts:
            size = shape.numel() * dtype.itemsize
            yield buffer[offset : offset + size].view(dtype).as_strided(shape, stride)


def _frozen(modules: Iterable[nn.Module], seen: set[int]) -> list[Tensor]:
    tensors = []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers(), *_scales(module)):
            if not tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors.append(tensor)
    return tensors


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """Scales and code books of bitsandbytes' 4-bit weights, which are neither parameters nor buffers."""
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (state.absmax, state.code)
            # Where the scales are quantized themselves.
            state = state.state2
