"""Which frozen weights are on the device: all of them, or those of the stage that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

_ALIGNMENT = 512  # bytes, of the CUDA allocator's blocks


class Offload:
    """Keeps the frozen weights of named parts in host memory and uploads a part when a stage uses it.

    Frozen weights never change, so nothing is copied back: a part that leaves is dropped. A part is one buffer, pinned
    where the device is CUDA, and one asynchronous copy. Trained parameters stay where they are.

    Args:
        parts: modules by name, their weights on the device or still on the host; a tensor that two parts share belongs
            to the first.
        device: where the stages run; a CPU works the same way, with copies in ordinary memory.
    """

    def __init__(self, parts: Mapping[str, Iterable[nn.Module]], device: torch.device) -> None:
        seen: set[int] = set()
        self._parts = {name: PinnedWeights(_frozen(modules, seen), device) for name, modules in parts.items()}

    @property
    def resident(self) -> frozenset[str]:
        """Names of the parts whose weights are on the device."""
        return frozenset(name for name, part in self._parts.items() if part.here)

    def leave(self, *names: str) -> None:
        """No other parts than these stay on the device."""
        for name, part in self._parts.items():
            if name not in names:
                part.drop()

    def use(self, *names: str) -> None:
        """These parts are on the device now, the others are not."""
        self.leave(*names)
        for name in names:
            self._parts[name].upload()


class PinnedWeights:
    """Tensors, and one buffer on the host that holds what is in them.

    Attributes:
        here: whether all of them are on the device.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self.here = all(tensor.device == device for tensor in tensors)
        self._places, size = [], 0
        for tensor in tensors:
            self._places.append((size, tensor.dtype, tensor.shape, tensor.stride()))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        like = tensors[0].data if tensors and self.here and device.type != "cuda" else torch.empty(0)
        self._host = like.new_empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for tensor, view in zip(tensors, self._views(self._host), strict=True):
            view.copy_(tensor.data)
        if not self.here:
            self._empty()

    def drop(self) -> None:
        self.here = False
        self._empty()

    def upload(self) -> None:
        if self.here:
            return
        buffer = self._host.to(self._device, copy=True, non_blocking=True)
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view
        self.here = True

    def _empty(self) -> None:
        for tensor in self._tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)

    def _views(self, buffer: Tensor) -> Iterable[Tensor]:
        for offset, dtype, shape, stride in self._places:
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
            # Where the scales are quantised themselves.
            state = state.state2
