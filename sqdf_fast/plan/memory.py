"""Memory and work of a step, stage by stage, counted at PyTorch's dispatcher on real or meta tensors.

Memory is the sum of the live untyped storages: a view adds nothing, a freed storage leaves at once. Arithmetic is
counted with the formulas of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from sqdf_fast.plan import workspace as workspaces

KINDS = ("weights", "gradients", "optimizer", "activations")
CUDA_GRANULARITY = 512
"""Bytes: PyTorch's CUDA caching allocator rounds every allocation up to a multiple (kMinBlockSize)."""


@dataclass
class StageCount:
    """Peak memory and work of one stage.

    Attributes:
        peak_bytes: live bytes at the peak; at_peak: the same by kind.
        flops: of matrix products, convolutions and attention.
        matrix_bytes: read and written by those operators; other_bytes: by all others.
        operators: how many ran, views left out.
    """

    peak_bytes: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    matrix_bytes: int = 0
    other_bytes: int = 0
    operators: int = 0


WORK = ("flops", "matrix_bytes", "other_bytes", "operators")


def scaled(stage: StageCount, factor: float) -> StageCount:
    """The stage with its work multiplied by ``factor``."""
    return replace(stage, **{name: round(getattr(stage, name) * factor) for name in WORK})


class MemoryCount(TorchDispatchMode):
    """Counts the storages that operators allocate inside the ``with`` block, and their work.

    Tensors on the meta device are counted as if they were allocated; copies of them to the host are not.

    Args:
        device: type of the device counted; tensors elsewhere are ignored.
        granularity: bytes to a multiple of which every storage is rounded up.
        workspace: model of the bytes that an operator allocates inside, which no dispatcher sees.

    Attributes:
        stages: counts by stage, "" for what ran before the first; stage_name: the current one.
        live_bytes: live bytes; live: the same by kind.
    """

    def __init__(
        self, device: str = "cpu", granularity: int = 1, workspace: workspaces.Workspace = workspaces.none
    ) -> None:
        super().__init__()
        self._device, self._granularity, self._workspace = device, granularity, workspace
        self._simulates = device == "meta"
        self.stages: dict[str, StageCount] = {}
        self.live_bytes, self.live = 0, dict.fromkeys(KINDS, 0)
        # A weak reference to each live storage, its size and its kind.
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._exchanging = False
        self._hooks: list[Any] = []
        self.stage("")

    @property
    def peak_bytes(self) -> int:
        """Peak of the largest stage."""
        return max(stage.peak_bytes for stage in self.stages.values())

    def register(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors allocated earlier, or change the kind of tensors already counted."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                reference, size, before = self._storages[key]
                self.live[before] -= size
                self.live[kind] += size
                self._storages[key] = reference, size, kind
            else:
                self._add(tensor, kind)
        self._note_peak()

    def register_module(self, module: nn.Module) -> None:
        """Count a module's parameters and buffers as weights, and its future gradients as gradients."""
        self.register((*module.parameters(), *module.buffers()), "weights")
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note_gradient))

    def stage(self, name: str) -> None:
        """Begin the stage ``name``, or continue it."""
        self.stage_name = name
        self._current = self.stages.setdefault(name, StageCount())

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count the block as the stage ``name``, then continue the stage before."""
        previous = self.stage_name
        self.stage(name)
        try:
            yield
        finally:
            self.stage(previous)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Count no peak while the block swaps tensors for others, only the state it ends in."""
        self._exchanging = True
        try:
            yield
        finally:
            self._exchanging = False
            self._note_peak()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._hooks:
            self._hooks.pop().remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in here; PyTorch's guard against it would cost more than the count.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):
            return func(*args, **kwargs)
        if func is _COPY and self._simulates and args[0].is_meta and getattr(kwargs.get("device"), "type", "") == "cpu":
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"), device="cpu")
        if func is _ADD and _accumulates(args):
            func = torch.ops.aten.add_.Tensor
            if not _only_here(args[0]):
                args = args[1], args[0]
        # Meta tensors have no values: a repeated call need not run.
        key = _key(func, args, kwargs, self._workspace) if self._simulates else None
        if key is not None and key not in _CALLS:
            _CALLS[key] = _repeatable(func, args, kwargs, self._workspace)
        call = _CALLS.get(key)
        if call is not None and call.repeat is not None:
            result = call.repeat(args)
        else:
            result = func(*args, **kwargs)
            call = _call(func, args, kwargs, result, self._workspace)
        made = [self._add(tensor, "activations") for tensor in _tensors(result)]
        if any(made) or call.inside:
            self._note_peak(call.inside)
        stage = self._current
        stage.operators += call.operators
        stage.flops += call.flops
        stage.matrix_bytes += call.matrix_bytes
        stage.other_bytes += call.other_bytes
        return result

    def _add(self, tensor: Tensor, kind: str) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != self._device or key in self._storages:
            return False
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key)), size, kind
        self.live[kind] += size
        self.live_bytes += size
        return True

    def _remove(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self.live[kind] -= size
        self.live_bytes -= size

    def _note_peak(self, inside: int = 0) -> None:
        total = self.live_bytes + inside
        if total > self._current.peak_bytes and not self._exchanging:
            at_peak = {**self.live, "activations": self.live["activations"] + inside}
            self._current.peak_bytes, self._current.at_peak = total, at_peak

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.register([parameter.grad], "gradients")


@dataclass(frozen=True)
class _Call:
    """What an operator costs on arguments of given shapes; ``repeat`` makes its result again from the arguments."""

    inside: int
    flops: int = 0
    matrix_bytes: int = 0
    other_bytes: int = 0
    operators: int = 0
    repeat: Callable[[tuple[Any, ...]], Any] | None = None


_CALLS: dict[Any, _Call | None] = {}
"""Calls on meta tensors made before; None: one that must run every time."""


def _call(func: Any, args: Any, kwargs: Any, result: Any, workspace: workspaces.Workspace) -> _Call:
    packet, inside, outputs = func._overloadpacket, workspace(func, args), _tensors(result)
    # Allocating an empty tensor writes nothing.
    if not outputs or packet in _UNWRITTEN:
        return _Call(inside)
    moved = sum(tensor.nbytes for tensor in (*outputs, *_tensors((args, kwargs))))
    if packet in FLOPS:
        return _Call(inside, FLOPS[packet](*args, **kwargs, out_val=result), matrix_bytes=moved, operators=1)
    return _Call(inside, other_bytes=moved, operators=1)


def _repeatable(func: Any, args: Any, kwargs: Any, workspace: workspaces.Workspace) -> _Call | None:
    """The call, made on copies of its arguments; None where its result cannot be made without it.

    PyTorch's own meta functions leave cycles behind that hold their arguments until garbage is collected: those
    that are counted are never given to them.
    """
    devices = {tensor.device.type for tensor in _tensors((args, kwargs))}
    if (devices or {getattr(kwargs.get("device"), "type", "")}) != {"meta"}:
        return None
    before, (args, kwargs) = _signature(args), tree_map(_stand_in, (args, kwargs))
    result = func(*args, **kwargs)
    repeat = _repeat(func, result, args, kwargs)
    # One that gave an argument another shape has to do so every time.
    if repeat is None or _signature(args) != before:
        return None
    return replace(_call(func, args, kwargs, result, workspace), repeat=repeat)


def _repeat(func: Any, result: Any, args: tuple[Any, ...], kwargs: Any) -> Callable[[tuple[Any, ...]], Any] | None:
    """Makes the result again; None unless it is new meta tensors or the argument written to."""
    if func._schema.is_mutable:
        places = [place for place, argument in enumerate(args) if argument is result]
        return itemgetter(places[0]) if isinstance(result, Tensor) and result.is_meta and places else None
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    outputs = result if isinstance(result, tuple) else (result,)
    made = [output for output in outputs if output is not None]
    if not made or not all(
        isinstance(o, Tensor) and o.is_meta and o.untyped_storage()._cdata not in inputs for o in made
    ):
        return None
    shapes = [None if o is None else (o.shape, o.stride(), o.dtype) for o in outputs]
    if isinstance(result, tuple):
        return lambda _: tuple(None if shape is None else _empty(*shape) for shape in shapes)
    shape = result.shape, result.stride(), result.dtype
    return lambda _: _empty(*shape)


@cache
def _is_view(func: Any) -> bool:
    # A reshape of a product's result is declared as if it made a tensor; it launches nothing.
    return bool(func.is_view) or func is _aten._unsafe_view.default


def _key(func: Any, args: Any, kwargs: Any, workspace: workspaces.Workspace) -> Any:
    """Cache key of a call on tensors without values; None for a call that must run."""
    key = func, workspace, _signature(args), _signature(kwargs.items())
    try:
        hash(key)
    except TypeError:
        return None
    return None if torch.Tag.inplace_view in func.tags else key


def _signature(arguments: Iterable[Any]) -> tuple[Any, ...]:
    described: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            described.append((argument.shape, argument.stride(), argument.dtype, argument.device))
        elif isinstance(argument, tuple | list):
            described.append(_signature(argument))
        else:
            described += type(argument), argument
    return tuple(described)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _stand_in(argument: Any) -> Any:
    return _empty(argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


def _empty(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _accumulates(args: tuple[Any, ...]) -> bool:
    """Whether an addition is autograd's accumulation of two gradients, which would reuse one of them.

    The engine adds in place unless a dispatch mode watches; then it makes a third tensor. Its condition
    (torch/csrc/autograd/input_buffer.cpp): gradients are not recorded, and nobody else holds the tensor.
    """
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1 or len(args) != 2:
        return False
    left, right = args
    if not isinstance(right, Tensor) or left.shape != right.shape or left.dtype != right.dtype:
        return False
    return _only_here(left) or _only_here(right)


def _only_here(tensor: Tensor) -> bool:
    # References of a tensor that the engine alone holds, on its way through the dispatcher into Python.
    held: int = tensor._use_count()  # type: ignore[attr-defined]
    return held <= 4 and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2


_aten = torch.ops.aten
_ADD, _COPY = _aten.add.Tensor, _aten._to_copy.default
_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[_aten._scaled_dot_product_flash_attention_backward]
    ),
}
