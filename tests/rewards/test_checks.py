from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import WeightedSum, checked_reward, load_reward, preflight
from sqdf_fast.rewards.base import FunctionReward

PROMPTS = ["a cat", "a dog", "a cow"]


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)


def reward(function: Callable[..., torch.Tensor]) -> FunctionReward:
    return FunctionReward(function, "mine", {})


def brightness(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(1, 2, 3))


def test_good_reward_passes_unchanged():
    pixels = images().requires_grad_()
    good = reward(lambda x, p: 2 * brightness(x))
    preflight(good, pixels, PROMPTS)
    assert pixels.grad is None
    scores = checked_reward(good, pixels, PROMPTS)
    torch.testing.assert_close(scores, 2 * pixels.mean(dim=(1, 2, 3)))
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    torch.testing.assert_close(gradient, torch.full_like(pixels, 2 / 105))


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_are_at_least_single_precision(given, returned):
    assert checked_reward(reward(lambda x, p: brightness(x)), images(given), PROMPTS).dtype == returned


def test_preflight_works_inside_no_grad():
    with torch.no_grad():
        preflight(reward(lambda x, p: brightness(x)), images(), PROMPTS)


FAULTS = {
    "column": (
        lambda x, p: brightness(x)[:, None],
        r"returned shape \[3, 1\] for 3 images; return .*shape \[3\]",
    ),
    "scalar": (lambda x, p: x.mean(), r"returned shape \[\] for 3 images"),
    "fewer": (lambda x, p: brightness(x)[:2], r"returned shape \[2\] for 3 images"),
    "list": (lambda x, p: brightness(x).tolist(), "returned list, not a torch tensor"),
    "integers": (lambda x, p: brightness(x).long(), r"returned torch\.int64; return floating-point scores"),
    "device": (lambda x, p: brightness(x).to("meta"), "returned scores on meta for images on cpu"),
    "nan": (
        lambda x, p: brightness(x) * torch.tensor([1.0, float("nan"), 1.0]),
        "returned nan for the prompt 'a dog'; a score must be finite",
    ),
    "infinite": (
        lambda x, p: brightness(x) / torch.tensor([1.0, 1.0, 0.0]),
        "returned inf for the prompt 'a cow'",
    ),
    "raises": (
        lambda x, p: x @ torch.ones(4),
        r"raised RuntimeError: .*given images float32 \[3, 3, 5, 7\] in \[0, 1\] on cpu and 3 prompts",
    ),
    "raises nothing to say": (lambda x, p: [][0:1].index(1), "raised ValueError"),
}


@pytest.mark.parametrize("check", [preflight, checked_reward])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_value_has_a_clear_line(check, fault):
    function, message = FAULTS[fault]
    with pytest.raises(UserError, match=message) as caught:
        check(reward(function), images(), PROMPTS)
    assert "'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


GRADIENT_FAULTS = {
    "detached": (lambda x, p: brightness(x.detach()), "detached from the images"),
    "no_grad": (torch.no_grad()(lambda x, p: brightness(x)), "detached from the images"),
    "elsewhere": (lambda x, p: torch.ones(3, requires_grad=True) * 2, "do not depend on `images`"),
    "zero": (lambda x, p: brightness(x.clamp(min=2.0)), "gradient of zero at every pixel"),
    "not finite": (
        lambda x, p: brightness((x - x.detach()).sqrt()),
        "finite scores but a gradient with NaN or infinity",
    ),
}


@pytest.mark.parametrize("fault", GRADIENT_FAULTS)
def test_fault_in_gradient_is_found_by_preflight(fault):
    function, message = GRADIENT_FAULTS[fault]
    with pytest.raises(UserError, match=message):
        preflight(reward(function), images(), PROMPTS)
    assert torch.isfinite(checked_reward(reward(function), images(), PROMPTS)).all()


def test_backward_that_raises():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.mean(dim=(1, 2, 3))

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no backward here")

    with pytest.raises(UserError, match="raised RuntimeError: no backward here in its backward pass"):
        preflight(reward(lambda x, p: Broken.apply(x)), images(), PROMPTS)


class DetachedMean(torch.nn.Module):
    """What users write: a network called under no_grad."""

    def forward(self, x):
        with torch.no_grad():
            return x.mean(dim=(1, 2, 3))


# The six ways to be wrong, as a user meets them, and the whole line that each gets.
SIX_WAYS = {
    "shape": (
        lambda x, p: brightness(x)[:, None],
        "reward 'mine' returned shape [3, 1] for 3 images; return one score an image, shape [3]",
    ),
    "dtype": (
        lambda x, p: (brightness(x) * 255).int(),
        "reward 'mine' returned torch.int32; return floating-point scores (float32)",
    ),
    "device": (
        lambda x, p: brightness(x).to("meta"),
        "reward 'mine' returned scores on meta for images on cpu; keep the computation on the images' device",
    ),
    "NaN": (
        lambda x, p: (brightness(x) - 2).sqrt(),
        "reward 'mine' returned nan for the prompt 'a cat'; "
        "a score must be finite: guard logarithms, roots and divisions",
    ),
    "detached": (
        lambda x, p: DetachedMean()(x),
        "reward 'mine' returned scores that are detached from the images; compute them with torch operations on "
        "`images`, without .detach(), .item(), numpy or no_grad; if that cannot be, use an objective that needs no "
        "gradient, --set algorithm=ddpo (or dpok, awm)",
    ),
    "raises": (
        lambda x, p: brightness(x) + torch.ones(7),
        "reward 'mine' raised RuntimeError: The size of tensor a (3) must match the size of tensor b (7) at "
        "non-singleton dimension 0; it was given images float32 [3, 3, 5, 7] in [0, 1] on cpu and 3 prompts",
    ),
}


@pytest.mark.parametrize("way", SIX_WAYS)
def test_each_way_to_be_wrong_has_its_line(way):
    function, line = SIX_WAYS[way]
    with pytest.raises(UserError) as caught:
        preflight(reward(function), images(), PROMPTS)
    assert str(caught.value) == line


@pytest.mark.parametrize("way", SIX_WAYS)
def test_in_a_sum_the_part_at_fault_is_named(way):
    function, line = SIX_WAYS[way]
    good = FunctionReward(lambda x, p: brightness(x), "good", {})
    with pytest.raises(UserError) as caught:
        preflight(WeightedSum("good+mine", [good, reward(function)], [1.0, 1.0]), images(), PROMPTS)
    assert str(caught.value) == line
    if way != "detached":
        with pytest.raises(UserError) as caught:
            checked_reward(WeightedSum("good+mine", [good, reward(function)], [1.0, 1.0]), images(), PROMPTS)
        assert str(caught.value) == line


@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_gradient_the_value_is_still_checked(fault):
    function, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        preflight(reward(function), images(), PROMPTS, needs_gradient=False)


def test_without_a_gradient_every_value_will_do():
    asked = []
    for function, _ in GRADIENT_FAULTS.values():
        preflight(reward(function), images(), PROMPTS, needs_gradient=False)
    preflight(load_reward("jpeg"), images(), PROMPTS, needs_gradient=False)
    watched = reward(lambda x, p: asked.append(torch.is_grad_enabled()) or brightness(x))
    preflight(watched, images(), PROMPTS, needs_gradient=False)
    assert asked == [False]


def test_sum_with_a_part_that_has_no_gradient():
    mixed = load_reward("warmth + jpeg*0.1")
    assert not mixed.differentiable
    with pytest.raises(
        UserError, match=r"'warmth\+jpeg\*0\.1' has no gradient \(for jpeg\) .*--set algorithm=ddpo \(or dpok, awm\)"
    ):
        preflight(mixed, images(), PROMPTS)
    preflight(mixed, images(), PROMPTS, needs_gradient=False)


def test_out_of_memory_is_not_the_rewards_fault():
    def exhausted(x, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        checked_reward(reward(exhausted), images(), PROMPTS)
