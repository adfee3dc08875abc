"""A fused op as a PyTorch operator with one kernel per device, and the fast path past PyTorch's dispatcher.

An operator of torch.library works under torch.compile, fake tensors and every other mode that intercepts operators.
That machinery costs about 70 microseconds of Python for a forward and a backward, as much as the arithmetic of a small
batch. Plain tensors therefore skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sqdf_fast.kernels.dispatch import fused, module

_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_SETTINGS = frozenset({type(None), bool, int, float, str, torch.dtype})
"""Types known not to be tensors: an `isinstance` check of each argument takes longer than the rest of `plain`."""


def plain(*arguments: Any) -> bool:
    """Whether the tensors among the arguments hold their values: not traced, not fake, not intercepted."""
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


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    bool: "bool",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


def schema(arguments: type[Any], results: int) -> str:
    """Arguments, a NamedTuple, and a number of tensors that result, as torch.library writes them."""
    given = (f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())
    tensors = ", ".join(["Tensor"] * results)
    return f"({', '.join(given)}) -> {tensors if results == 1 else f'({tensors})'}"


class Operator:
    """`sqdf_fast::<op>_<function>`: runs a function of the op's fused implementation on its first argument's device.

    Args:
        op: folder of the op.
        function: function of its implementations that the operator runs; part of its name unless "forward".
        arguments: NamedTuple of the arguments, which the function receives.
        results: number of tensors that it returns.
        fake: (arguments) -> results without values.
    """

    def __init__(self, op: str, function: str, arguments: type[Any], results: int, fake: Callable[[Any], Any]) -> None:
        self._op, self._function, self._arguments = op, function, arguments
        self._modules: dict[str, ModuleType] = {}
        self._call: Callable[..., Any] = self._run
        name = f"sqdf_fast::{op}" if function == "forward" else f"sqdf_fast::{op}_{function}"
        self.dispatched = torch.library.custom_op(
            name, self._run, mutates_args=(), device_types="cpu", schema=schema(arguments, results)
        )
        self.dispatched.register_kernel("cuda")(self._run)
        self.dispatched.register_fake(lambda *given: fake(arguments(*given)))

    def __call__(self, *arguments: Any) -> Any:
        """Run the operator; plain tensors take the fast path, with the same result."""
        return self._call(*arguments) if plain(*arguments) else self.dispatched(*arguments)

    def register_backward(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Make the operator differentiable, once.

        Args:
            setup_context, backward: as `torch.library.register_autograd` takes them, with the arguments as their
                NamedTuple; backward gets None for the gradient of an output that is not part of the loss.
        """

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, self._arguments(*inputs), output)

        # a Function with its own setup_context binds its arguments through inspect, at 20 microseconds a call
        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)
            given = self._arguments(*arguments)
            output = self._compute(given)
            setup_context(ctx, given, output)
            return output

        backward_only_once = once_differentiable(backward)

        def backward_once(ctx: Any, *grads: Any) -> Any:
            # gradients are enabled in a backward pass only if that pass will be differentiated itself
            return backward_only_once(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

        self.dispatched.register_autograd(backward, setup_context=setup)
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
        function: Any = type(self.dispatched._name, (torch.autograd.Function,), members)
        self._call = function.apply

    def _run(self, *arguments: Any) -> Any:
        return self._compute(self._arguments(*arguments))

    def _compute(self, given: Any) -> Any:
        device = "cuda" if given[0].is_cuda else "cpu"
        implementation = self._modules.get(device)
        if implementation is None:
            implementation = self._modules[device] = module(self._op, fused(self._op, device))
        return getattr(implementation, self._function)(given)
