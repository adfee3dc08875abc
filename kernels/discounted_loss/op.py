"""discounted_loss as a PyTorch operator: what fake tensors see, what autograd does, around a fused implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqdf_fast.kernels.autograd import differentiable
from sqdf_fast.kernels.dispatch import module


def _forward(
    reward: Tensor,
    kl: Tensor,
    remaining: Tensor,
    gamma: float,
    alpha: float,
    mask_nonpositive: bool,
    denominator: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_reward, grad_kl = module("discounted_loss", impl).forward(
        reward, kl, remaining, gamma, alpha, mask_nonpositive, denominator
    )
    return loss, grad_reward, grad_kl


_forward_op = torch.library.custom_op("sqdf_fast::discounted_loss", _forward, mutates_args=())


@_forward_op.register_fake
def _(reward: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(reward.new_empty(shape, dtype=torch.float32) for shape in ((), reward.shape, reward.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    reward, kl = inputs[:2]
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = reward.dtype, kl.dtype


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 8
    # the forward's launch left the gradients of the loss; only the chain rule's factor is missing
    grads = [
        (grad_loss * grad).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*grads, *(None,) * 6)


discounted_loss = differentiable(_forward_op, _forward, _setup_context, _autograd)
