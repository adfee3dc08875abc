"""Custom ops with a backward, and the short way to call them.

An op is registered with torch.library: it works under torch.compile, fake tensors and every other mode that
intercepts operators. That machinery costs about 70 microseconds of Python for a forward and a backward, as much as
the arithmetic of a small batch. Plain tensors therefore take the same forward and backward through an
autograd function of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_SETTINGS = frozenset({type(None), bool, int, float, str, torch.dtype})
"""Known not to be tensors; asking `isinstance` of each takes longer than all else in `plain`."""


def plain(*arguments: Any) -> bool:
    """Whether the tensors among the arguments hold their values, neither traced nor faked nor intercepted."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    for a in arguments:
        kind = type(a)
        if kind in _PLAIN_TENSORS:
            if a.is_neg():
                return False
        elif kind not in _SETTINGS and isinstance(a, Tensor):
            return False
    return True


def differentiable(
    op: CustomOpDef,
    compute: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Give `op` its backward, and return what calls it: the op itself, or for plain tensors `compute` directly.

    Args:
        op: the custom op, with a fake implementation.
        compute: what the op runs; the same positional arguments.
        setup_context, backward: as `torch.library.register_autograd` takes them; backward gets None for
            an output whose gradient is undefined.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    # a Function with a setup_context of its own binds its arguments through inspect, at 20 microseconds a call
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = compute(*arguments)
        setup(ctx, arguments, output)
        return output

    refuse_twice = once_differentiable(backward)

    def backward_once(ctx: Any, *grads: Any) -> Any:
        # gradients are enabled in a backward pass that shall be differentiated itself, and only there
        return refuse_twice(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    op.register_autograd(backward, setup_context=setup)
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function: Any = type(op._name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        return function.apply(*arguments) if plain(*arguments) else op(*arguments)

    return call
