"""Memory and work of a step, stage by stage, counted at PyTorch's dispatcher on real or meta tensors.

Memory is the sum of the live untyped storages: a view adds nothing, a freed storage leaves at once. Arithmetic is
counted with the formulas of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

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
    work = {name: round(getattr(stage, name) * factor) for name in WORK}
    return replace(stage, **work)


class MemoryCount(TorchDispatchMode):
    """Counts the storages that operators allocate inside the ``with`` block, and their work.

    Tensors on the meta device are counted as if they were allocated; copies of them to the host are not.

    Args:
        device: type of the device counted; tensors elsewhere are ignored.
        granularity: bytes to a multiple of which every storage is rounded up.
        workspace: model of the bytes that an operator allocates inside, which no dispatcher sees.
    """

    def __init__(
        self, device: str = "cpu", granularity: int = 1, workspace: workspaces.Workspace = workspaces.none
    ) -> None:
        super().__init__()
        self.stages: dict[str, StageCount] = {}
        self._device, self._granularity, self._workspace = device, granularity, workspace
        self._live: dict[int, _Living] = {}
        self._by_kind: Counter[str] = Counter()
        self._total = 0
        self.stage_name, self._exchanging = "", False
        self._current = self._enter("")
        self._hooks: list[Any] = []
        self._simulates = device == "meta"

    @property
    def live_bytes(self) -> int:
        """Live bytes."""
        return self._total

    @property
    def live(self) -> dict[str, int]:
        """Live bytes by kind."""
        return {kind: self._by_kind[kind] for kind in KINDS}

    @property
    def peak_bytes(self) -> int:
        """Peak of the largest stage."""
        return max(stage.peak_bytes for stage in self.stages.values())

    def register(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors allocated earlier, or change the kind of tensors already counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._add(tensor, kind)
            else:
                self._by_kind[known.kind] -= known.size
                self._by_kind[kind] += known.size
                known.kind = kind
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
        self._current = self._enter(name)

    @contextmanager
    def counting(self, name: str) -> Iterator[StageCount]:
        """Count the block as the stage ``name``, then continue the stage before."""
        previous = self.stage_name
        self.stage(name)
        try:
            yield self._current
        finally:
            self.stage(previous)

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
        if _is_view(func):
            return func(*args, **kwargs) if kwargs else func(*args)
        if func is _COPY and self._simulates and kwargs and _leaves(args[0], kwargs):
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"), device="cpu")
        if func is _ADD and _accumulates(args):
            func = torch.ops.aten.add_.Tensor
            if not _only_here(args[0]):
                args = args[1], args[0]
        kwargs = kwargs or {}
        # Meta tensors have no values: a repeated call need not run.
        key = _key(func, args, kwargs, self._workspace) if self._simulates else None
        call = _CALLS.get(key)
        if call is None and key is not None:
            call = _Call.tried(func, args, kwargs, self._workspace)
            if call is not None:
                _CALLS[key] = call
        if call is not None:
            result, outputs = call.made_again(args)
        else:
            result = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            call = _Call.of(func, args, kwargs, result, outputs, self._workspace)
        self._count(call, outputs)
        return result

    def _count(self, call: _Call, outputs: Iterable[Tensor]) -> None:
        made = False
        for tensor in outputs:
            made |= self._add(tensor, "activations")
        if made or call.inside:
            self._note_peak(call.inside)
        stage = self._current
        stage.operators += call.counted
        stage.flops += call.flops
        stage.matrix_bytes += call.matrix_bytes
        stage.other_bytes += call.other_bytes

    def _enter(self, name: str) -> StageCount:
        return self.stages.setdefault(name, StageCount())

    def _add(self, tensor: Tensor, kind: str) -> bool:
        if tensor.device.type != self._device:
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return False
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._live[key] = _Living(storage, self._removed, key, size, kind)
        self._by_kind[kind] += size
        self._total += size
        return True

    def _removed(self, living: _Living) -> None:
        del self._live[living.key]
        self._by_kind[living.kind] -= living.size
        self._total -= living.size

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Count no peak while the block swaps tensors for others, only the state it ends in."""
        self._exchanging = True
        try:
            yield
        finally:
            self._exchanging = False
            self._note_peak()

    def _note_peak(self, inside: int = 0) -> None:
        if self._exchanging:
            return
        total = self._total + inside
        if total > self._current.peak_bytes:
            live = self.live
            live["activations"] += inside
            self._current.peak_bytes, self._current.at_peak = total, live

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.register([parameter.grad], "gradients")


class _Living(weakref.ref[Any]):
    """A live storage; calls back when it is freed."""

    __slots__ = ("key", "kind", "size")

    def __new__(cls, storage: Any, removed: Callable[[_Living], None], *_: Any) -> _Living:
        return super().__new__(cls, storage, removed)

    def __init__(self, storage: Any, removed: Callable[[_Living], None], key: int, size: int, kind: str) -> None:
        self.key, self.size, self.kind = key, size, kind


@dataclass(frozen=True)
class _Again:
    """How to make a call's result without the call.

    Attributes:
        made: shape, stride and type of each new tensor, None for one that it left out; argument: the position of the
            one that it returns, having written to it, or None.
        single: whether it returns no tuple.
    """

    made: tuple[tuple[Any, ...] | None, ...] = ()
    argument: int | None = None
    single: bool = True


@dataclass(frozen=True)
class _Call:
    """One operator on arguments of given shapes: its cost and its result."""

    inside: int
    flops: int
    matrix_bytes: int
    other_bytes: int
    counted: bool
    again: _Again = _Again()

    @staticmethod
    def of(
        func: Any, args: Any, kwargs: Any, result: Any, outputs: Sequence[Tensor], workspace: workspaces.Workspace
    ) -> _Call:
        if not outputs:
            return _Call(workspace(func, args), 0, 0, 0, False)
        packet = func._overloadpacket
        moved = sum(map(_nbytes, outputs)) + sum(
            _nbytes(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)
        )
        inside, count = workspace(func, args), FLOPS.get(packet)
        if count is None:
            # Allocating an empty tensor writes nothing.
            return _Call(inside, 0, 0, 0 if packet in _UNWRITTEN else moved, packet not in _UNWRITTEN)
        return _Call(inside, count(*args, **kwargs, out_val=result), moved, 0, True)

    @staticmethod
    def tried(func: Any, args: Any, kwargs: Any, workspace: workspaces.Workspace) -> _Call | None:
        """The call on copies of its arguments; None where its result cannot be made without it.

        PyTorch's own meta functions leave cycles behind that hold their arguments until garbage is collected: those
        that are counted are never given to them.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors} or {getattr(kwargs.get("device"), "type", "")}
        if devices != {"meta"}:
            return None
        before, (args, kwargs) = _signature(args), tree_map(_stand_in, (args, kwargs))
        result = func(*args, **kwargs)
        again = _again(func, result, args, kwargs)
        # One that gave an argument another shape has to do so every time.
        if again is None or _signature(args) != before:
            return None
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return replace(_Call.of(func, args, kwargs, result, outputs, workspace), again=again)

    def made_again(self, args: tuple[Any, ...]) -> tuple[Any, Sequence[Tensor]]:
        """The result and the tensors in it."""
        again = self.again
        if again.argument is not None:
            return args[again.argument], (args[again.argument],)
        if again.single and (only := again.made[0]) is not None:
            tensor = _empty(*only)
            return tensor, (tensor,)
        result = tuple(None if o is None else _empty(*o) for o in again.made)
        return result, [tensor for tensor in result if tensor is not None]


_CALLS: dict[Any, _Call] = {}


@cache
def _is_view(func: Any) -> bool:
    # A reshape of a product's result is declared as if it made a tensor; it launches nothing.
    return bool(func.is_view) or func is _aten._unsafe_view.default


@cache
def _may_be_remembered(func: Any) -> bool:
    return torch.Tag.inplace_view not in func.tags


def _key(func: Any, args: Any, kwargs: Any, workspace: workspaces.Workspace) -> Any:
    """Cache key of a call on tensors without values; None for a call that must run."""
    if not _may_be_remembered(func):
        return None
    key = func, workspace, _signature(args), _signature(tuple(kwargs.items())) if kwargs else None
    try:
        hash(key)
    except TypeError:
        return None
    return key


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


def _again(func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Again | None:
    """How to repeat a result; None unless it is new meta tensors or the argument written to."""
    if func._schema.is_mutable:
        places = [place for place, argument in enumerate(args) if argument is result]
        meta = isinstance(result, Tensor) and result.device.type == "meta"
        return _Again(argument=places[0]) if meta and places else None
    inputs = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
    flat = result if isinstance(result, tuple) else (result,)
    made = [leaf for leaf in flat if leaf is not None]
    if not made or not all(
        isinstance(o, Tensor) and o.device.type == "meta" and o.untyped_storage()._cdata not in inputs for o in made
    ):
        return None
    shapes = tuple(None if o is None else (o.shape, o.stride(), o.dtype) for o in flat)
    return _Again(shapes, single=not isinstance(result, tuple))


def _stand_in(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return _empty(argument.shape, argument.stride(), argument.dtype)


def _empty(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _leaves(tensor: Tensor, options: dict[str, Any]) -> bool:
    """Whether a copy takes a meta tensor to the host."""
    device = options.get("device")
    return tensor.device.type == "meta" and device is not None and device.type == "cpu"


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


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_aten = torch.ops.aten
_ADD, _COPY = _aten.add.Tensor, _aten._to_copy.default
_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
