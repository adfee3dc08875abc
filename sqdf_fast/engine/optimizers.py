"""AdamW with 32-bit or 8-bit states, on the parameters' device or on the CPU; see docs/optimizers.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqdf_fast.config import Optimizer as Settings
from sqdf_fast.errors import UserError
from sqdf_fast.kernels.adamw_8bit import (
    BLOCK,
    Coefficients,
    adamw_8bit,
    adamw_32bit,
    round_stochastically,
    sum_of_squares,
)
from sqdf_fast.kernels.philox import derive_seed

MIN_8BIT_SIZE = 4096
"""Parameters of fewer elements keep states of 32 bits, as in bitsandbytes."""

_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_
_MAPS = ("qmap1", "qmap2")  # constants that bitsandbytes keeps among a parameter's states


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: Settings, device: torch.device | str, *, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of a configuration, for parameters on `device`.

    adamw is torch.optim.AdamW, fused, or `BlockwiseAdamW` with states of 32 bits where a parameter is bfloat16 or
    the states live on another device. adamw8bit is bitsandbytes' AdamW8bit for states on a GPU, else
    `BlockwiseAdamW`; paged_adamw8bit the same with states that CUDA may evict, on a CPU adamw8bit. All of them round
    bfloat16 parameters stochastically.

    Args:
        seed: seed for stochastic rounding; the same seed gives the same bits.

    Raises:
        UserError: bitsandbytes is missing; a combination or a dtype that is not supported.
    """
    parameters, device = list(parameters), torch.device(device)
    if settings.kind == "paged_adamw8bit" and settings.states == "cpu":
        raise UserError(
            "optimizer.kind=paged_adamw8bit with optimizer.states=cpu: paged states move between device and CPU "
            "already; set optimizer.states=device, or optimizer.kind=adamw8bit"
        )
    offloaded = settings.states == "cpu" and device.type != "cpu"
    if settings.kind == "adamw" and not offloaded and all(p.dtype != torch.bfloat16 for p in parameters):
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, **_hyperparameters(settings), fused=fused)
    if settings.kind != "adamw" and not offloaded and device.type == "cuda":
        return _bitsandbytes(parameters, settings, seed)
    return BlockwiseAdamW(
        parameters,
        **_hyperparameters(settings),
        min_8bit_size=None if settings.kind == "adamw" else MIN_8BIT_SIZE,
        states_on="cpu" if offloaded else None,
        seed=seed,
    )


def clip_grad_norm(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Clip all gradients together to an L2 norm, and return the norm before: torch.nn.utils.clip_grad_norm_.

    With `BlockwiseAdamW` the next step applies the factor and the gradients stay as they are; after a non-finite norm
    that step changes nothing.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(optimizer, BlockwiseAdamW):
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    norm = gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    optimizer.gradient_scale = min(1.0, max_norm / (norm + _CLIP_EPS)) if math.isfinite(norm) else math.nan
    return norm


def gradient_norm(gradients: list[Tensor]) -> float:
    """The L2 norm of all elements; on the CPU accumulated in float64, the same bits for any number of threads."""
    if any(gradient.device.type != "cpu" or gradient.dtype == torch.float64 for gradient in gradients):
        return float(nn.utils.get_total_norm(gradients))
    return math.sqrt(sum_of_squares([_flat(g, _memory_format(g) or torch.contiguous_format) for g in gradients]))


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the states that the next step needs, so that memory runs out here, before a parameter changes."""
    if isinstance(optimizer, BlockwiseAdamW):
        optimizer.allocate()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state.get(parameter):
                _fresh_state(optimizer, parameter)


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state of a parameter as tensors for a checkpoint; empty before the first step."""
    state = optimizer.state[parameter]
    return {name: torch.as_tensor(value) for name, value in state.items() if name not in _MAPS}


def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, tensors: Mapping[str, Tensor]
) -> None:
    """Give a parameter the state that `state_tensors` returned, from any device.

    Raises:
        ValueError: the state is that of another kind of optimizer or of another parameter.
    """
    if not tensors:
        optimizer.state.pop(parameter, None)
    elif isinstance(optimizer, BlockwiseAdamW):
        optimizer.load_state(parameter, tensors)
    else:
        _fill(_fresh_state(optimizer, parameter), tensors)


class BlockwiseAdamW(torch.optim.Optimizer):
    """AdamW on float32 and bfloat16 parameters with block-wise 8-bit states, through the op `adamw_8bit`.

    Parameters on another device than their states are copied to the states' device with their gradients, updated and
    copied back; on CUDA through pinned memory on a stream of its own. State of a parameter, named and stored as in
    bitsandbytes: step (int) and state1, state2 in its shape, uint8 with absmax1, absmax2 float32 [ceil(numel / 256)],
    or float32.

    Args:
        parameters: contiguous or channels_last.
        min_8bit_size: parameters of fewer elements keep float32 states; None: all of them.
        states_on: device of the states; None: that of their parameter.
        seed: seed for stochastic rounding of bfloat16, together with step and position of the parameter.
        impl: implementation of the op.

    Raises:
        UserError: another dtype or memory layout of a parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int | None = MIN_8BIT_SIZE,
        states_on: torch.device | str | None = None,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.min_8bit_size, self.seed, self.impl = min_8bit_size, seed, impl
        self.states_on = None if states_on is None else torch.device(states_on)
        self.gradient_scale = 1.0
        """Factor of all gradients in the next step, for that step alone; not finite: the step changes nothing."""
        self._staging = _Staging()
        for parameter, _ in self._parameters():
            _check_parameter(parameter)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        scale, self.gradient_scale = self.gradient_scale, 1.0
        if not math.isfinite(scale):
            return
        self.allocate()
        staged: list[_Job] = []
        for number, (parameter, group) in enumerate(self._parameters()):
            if parameter.grad is None:
                continue
            layout = _memory_format(parameter)
            assert layout is not None
            update = partial(self._update, self.state[parameter], group, number, layout, scale)
            job = update, _flat(parameter, layout), _flat(parameter.grad, layout)
            if parameter.device == self._home(parameter):
                update(*job[1:])
            else:
                staged.append(job)
        if staged:
            self._staging.run(staged)

    def allocate(self) -> None:
        """States of all parameters that have a gradient, and buffers for those that the CPU updates."""
        parameters = [parameter for parameter, _ in self._parameters() if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                self.state[parameter] = self._fresh_state(parameter)
            elif not isinstance(state["step"], int):  # set from a checkpoint without `load_state`
                self.load_state(parameter, state)
        self._staging.allocate([p for p in parameters if p.device != self._home(p)])

    def load_state(self, parameter: nn.Parameter, tensors: Mapping[str, Any]) -> None:
        """Copy a state of these names, from any device and in any memory layout; bitsandbytes' maps are ignored.

        Raises:
            ValueError: the state is that of another kind of optimizer or of another parameter.
        """
        state = self._fresh_state(parameter)
        _fill(state, tensors)
        self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, but states keep their dtype and device."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (parameter, _) in zip(ids, self._parameters(), strict=True):
            if i in state_dict["state"]:
                self.load_state(parameter, state_dict["state"][i])

    def _parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    def _home(self, parameter: nn.Parameter) -> torch.device:
        return self.states_on or parameter.device

    def _update(
        self,
        state: dict[str, Any],
        group: dict[str, Any],
        number: int,
        layout: torch.memory_format,
        scale: float,
        values: Tensor,
        gradient: Tensor,
    ) -> None:
        """The step of parameter ``number``: values [n], in place, and gradient [n], both on the states' device."""
        state["step"] += 1
        beta1, beta2 = group["betas"]
        coefficients = Coefficients.of(
            state["step"], group["lr"], beta1, beta2, group["eps"], group["weight_decay"], scale
        )
        seed = derive_seed(self.seed, state["step"], number)
        state1, state2 = (_flat(state[name], layout) for name in ("state1", "state2"))
        if "absmax1" in state:
            scales = state["absmax1"], state["absmax2"]
            adamw_8bit(values, gradient, state1, state2, *scales, coefficients, seed=seed, impl=self.impl)
        else:
            adamw_32bit(values, gradient, state1, state2, coefficients, seed=seed, impl=self.impl)

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        device = self._home(parameter)
        quantized = self.min_8bit_size is not None and parameter.numel() >= self.min_8bit_size
        dtype, blocks = torch.uint8 if quantized else torch.float32, -(-parameter.numel() // BLOCK)
        state: dict[str, Any] = {"step": 0}
        for name in ("state1", "state2"):
            state[name] = torch.zeros_like(parameter, dtype=dtype, device=device, requires_grad=False)
        if quantized:
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(blocks, dtype=torch.float32, device=device)
        return state


_Job = tuple[Callable[[Tensor, Tensor], None], Tensor, Tensor]
"""An update, and the values and gradient [n] that it is called with copies of."""


class _Staging:
    """Two buffers in pinned memory that parameters and gradients alternate in on their way to the CPU and back.

    All copies are on one stream: first the next parameter down, then this one up. So a buffer is written only after
    its contents have left, and copies of one buffer overlap with the update in the other.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._buffers: list[Tensor] = []

    def allocate(self, parameters: list[nn.Parameter]) -> None:
        """Two buffers, each large enough for any of these parameters and its gradient."""
        size = max((_aligned(p.nbytes) + p.grad.nbytes for p in parameters if p.grad is not None), default=0)
        if size > (self._buffers[0].numel() if self._buffers else 0):
            pinned = parameters[0].device.type == "cuda"
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def run(self, jobs: list[_Job]) -> None:
        """Every update on copies of its values and gradient; the values are copied back."""
        device = jobs[0][1].device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            fetched = self._fetch(jobs[0], 0)
            for i, (update, values, _) in enumerate(jobs):
                host_values, host_gradient, event = fetched
                if i + 1 < len(jobs):
                    fetched = self._fetch(jobs[i + 1], (i + 1) % 2)
                if event is not None:
                    event.synchronize()
                update(host_values, host_gradient)
                values.copy_(host_values, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)

    def _fetch(self, job: _Job, number: int) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        _, values, gradient = job
        buffer, begin = self._buffers[number], _aligned(values.nbytes)
        host_values = buffer[: values.nbytes].view(values.dtype).copy_(values, non_blocking=True)
        host_gradient = buffer[begin : begin + gradient.nbytes].view(gradient.dtype).copy_(gradient, non_blocking=True)
        return host_values, host_gradient, None if self._stream is None else self._stream.record_event()


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _check_parameter(parameter: nn.Parameter) -> None:
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"a parameter is {parameter.dtype}; 8-bit and CPU states take float32 and bfloat16: set the dtype of the "
            "trained parameters, or optimizer.kind=adamw and optimizer.states=device"
        )
    if _memory_format(parameter) is None:
        raise UserError(
            f"a parameter of shape {tuple(parameter.shape)} has strides {tuple(parameter.stride())}; "
            "8-bit and CPU states take contiguous and channels_last parameters"
        )


def _memory_format(tensor: Tensor) -> torch.memory_format | None:
    """The layout in which a tensor is dense, or None."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return layout if layout is not None and tensor.is_contiguous(memory_format=layout) else None


def _flat(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """The elements in memory order, [n]; a view where the tensor has the layout."""
    tensor = tensor.detach().contiguous(memory_format=layout)
    return (tensor if layout == torch.contiguous_format else tensor.movedim(1, -1)).reshape(-1)


def _fill(state: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """Copy `tensors` into a fresh state. Raises ValueError where they do not fit."""
    names = state.keys() - set(_MAPS)
    if names != tensors.keys() - set(_MAPS):
        raise ValueError(f"the optimizer's state has {sorted(names)}, not {sorted(tensors)}")
    for name in sorted(names):
        given, target = torch.as_tensor(tensors[name]), torch.as_tensor(state[name])
        if name == "step":
            state[name] = target.copy_(given) if isinstance(state[name], Tensor) else int(given)
        elif given.dtype != target.dtype or given.shape != target.shape:
            expected = f"{target.dtype} {tuple(target.shape)}"
            raise ValueError(f"the optimizer's {name} is {expected}, not {given.dtype} {tuple(given.shape)}")
        else:
            target.copy_(given)


def _fresh_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Set the state with which torch.optim.AdamW or bitsandbytes begins."""
    numbered = [(i, j, p) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])]
    i, j = next((i, j) for i, j, other in numbered if other is parameter)
    group = optimizer.param_groups[i]
    state: dict[str, Any] = optimizer.state[parameter]
    state.clear()
    try:
        if isinstance(optimizer, torch.optim.AdamW):
            # A fused step counts on the parameter's device.
            device = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, requires_grad=False)
        else:
            # Paged memory where the optimizer is paged.
            optimizer.init_state(group, parameter, i, j)
    except BaseException:
        # An incomplete state would be taken for a complete one.
        state.clear()
        raise
    return state


def _hyperparameters(settings: Settings) -> dict[str, Any]:
    return {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _bitsandbytes(parameters: list[nn.Parameter], settings: Settings, seed: int) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit, paged or not, with stochastic rounding of bfloat16 parameters."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.kind={settings.kind} needs bitsandbytes ({error}); install sqdf-fast[cuda], "
            "or set optimizer.states=cpu or optimizer.kind=adamw"
        ) from None

    class StochasticAdamW8bit(AdamW8bit):
        def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
            if p.dtype != torch.bfloat16:
                super().update_step(group, p, gindex, pindex)
                return
            # bitsandbytes rounds to nearest, which loses every step below half of a weight's last bit.
            wide = nn.Parameter(p.detach().to(torch.float32, memory_format=torch.contiguous_format))
            wide.grad = None if p.grad is None else p.grad.to(torch.float32)
            state = self.state[wide] = self.state.pop(p)
            super().update_step(group, wide, gindex, pindex)
            self.state[p] = self.state.pop(wide)
            number = sum(len(other["params"]) for other in self.param_groups[:gindex]) + pindex
            rounded = round_stochastically(wide.detach().view(-1), derive_seed(seed, state["step"], number))
            p.copy_(rounded.view(p.shape))

    paged = settings.kind == "paged_adamw8bit"
    optimizer: torch.optim.Optimizer = StochasticAdamW8bit(
        parameters, **_hyperparameters(settings), min_8bit_size=MIN_8BIT_SIZE, is_paged=paged
    )
    return optimizer
