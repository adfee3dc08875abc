"""Checks of rewards, which are users' code: what they return is checked before it can reach the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sqdf_fast.errors import UserError, describe
from sqdf_fast.rewards.base import Reward, exact

_GRADIENT_FREE = "use an objective that needs no gradient, --set algorithm=ddpo (or dpok, awm)"


def checked_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``reward(images, prompts)``, refused unless it is one finite number an image.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        prompts: B prompts.

    Returns:
        float32 [B] (float64 for float64 images), with the reward's graph.

    Raises:
        UserError: the reward raises, or returns no tensor, the wrong shape, dtype or device, NaN or infinity.
            Running out of memory is not the reward's fault and passes through.
    """
    scores = called(reward, images, prompts)
    finite = torch.isfinite(scores)
    if not finite.all():
        for part in reward.parts():
            # In a sum, the part at fault is named.
            checked_reward(part, images, prompts)
        index = int(finite.logical_not().nonzero()[0])
        raise UserError(
            f"reward {reward.name!r} returned {scores[index].item()} for the prompt {prompts[index]!r}; "
            "a score must be finite: guard logarithms, roots and divisions"
        )
    return scores


def called(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """As :func:`checked_reward`, without a look at the values, which would wait for the device."""
    try:
        scores = reward(images, prompts)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        dtype = str(images.dtype).removeprefix("torch.")
        raise UserError(
            f"reward {reward.name!r} raised {describe(error)}; it was given images {dtype} {list(images.shape)} "
            f"in [0, 1] on {images.device} and {len(images)} prompts"
        ) from error
    if not isinstance(scores, Tensor):
        raise UserError(f"reward {reward.name!r} returned {type(scores).__name__}, not a torch tensor of shape [B]")
    if scores.shape != (len(images),):
        raise UserError(
            f"reward {reward.name!r} returned shape {list(scores.shape)} for {len(images)} images; "
            f"return one score an image, shape [{len(images)}]"
        )
    if not scores.is_floating_point():
        raise UserError(f"reward {reward.name!r} returned {scores.dtype}; return floating-point scores (float32)")
    if scores.device != images.device:
        raise UserError(
            f"reward {reward.name!r} returned scores on {scores.device} for images on {images.device}; "
            "keep the computation on the images' device"
        )
    return scores.to(torch.promote_types(scores.dtype, exact(images.dtype)))


def preflight(reward: Reward, images: Tensor, prompts: Sequence[str], *, needs_gradient: bool = True) -> None:
    """Run the reward and its gradient once, before the first training step; of a sum, each part by itself.

    Args:
        images: float [B, 3, H, W] in [0, 1], B >= 1, as training will show them to the reward.
        prompts: B prompts.
        needs_gradient: False for a gradient-free objective: the value alone is checked.

    Raises:
        UserError: whatever :func:`checked_reward` refuses; no gradient, or one that is not finite or zero
            at every pixel.
    """
    if not needs_gradient:
        with torch.no_grad():
            checked_reward(reward, images, prompts)
        return
    if not reward.differentiable:
        named = [part.name for part in reward.parts() if not part.differentiable]
        which = f" (for {', '.join(named)})" if named else ""
        raise UserError(
            f"reward {reward.name!r} has no gradient{which} and the objective follows d reward / d image; "
            f"{_GRADIENT_FREE}, or train on a differentiable surrogate of it and keep this one for evaluation"
        )
    if reward.parts():
        for part in reward.parts():
            preflight(part, images, prompts)
        return
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_(True)
        scores = checked_reward(reward, pixels, prompts)
        if not scores.requires_grad:
            raise UserError(
                f"reward {reward.name!r} returned scores that are detached from the images; "
                "compute them with torch operations on `images`, without .detach(), .item(), numpy or no_grad; "
                f"if that cannot be, {_GRADIENT_FREE}"
            )
        try:
            gradient = torch.autograd.grad(scores.sum(), pixels, allow_unused=True)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(f"reward {reward.name!r} raised {describe(error)} in its backward pass") from error
    if gradient is None:
        raise UserError(
            f"reward {reward.name!r} has a gradient, but not with respect to the images: "
            "its scores do not depend on `images`"
        )
    if not torch.isfinite(gradient).all():
        raise UserError(
            f"reward {reward.name!r} has finite scores but a gradient with NaN or infinity; "
            "guard square roots and norms at zero, e.g. with a small epsilon"
        )
    if not gradient.any():
        raise UserError(
            f"reward {reward.name!r} has a gradient of zero at every pixel: training would change nothing; "
            f"replace rounding, comparisons, argmax and hard clamps by smooth operations, or {_GRADIENT_FREE}"
        )
