"""discounted_loss as a PyTorch operator: schema, fake tensors and autograd of the fused implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqdf_fast.kernels.discounted_loss.reference import Forward
from sqdf_fast.kernels.operators import Operator


def _fake(given: Forward) -> tuple[Tensor, ...]:
    reward = given.reward
    return tuple(reward.new_empty(shape, dtype=torch.float32) for shape in ((), reward.shape, reward.shape))


discounted_loss = Operator("discounted_loss", "forward", Forward, 3, _fake)


def _setup_context(ctx: Any, given: Forward, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = given.reward.dtype, given.kl.dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 7
    # the forward's launch left the gradients of the loss; only the chain rule's factor is missing
    grads = [
        (grad_loss * grad).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*grads, *(None,) * 5)


discounted_loss.register_backward(_setup_context, _backward)
