from __future__ import annotations

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import ImageJudge, Judge, Judges, PromptJudge, Values, bootstrap_interval, evaluate_images
from sqdf_fast.evaluate.distance import KernelDistance
from sqdf_fast.evaluate.embedding import Thumbnails
from sqdf_fast.rewards.base import FunctionReward, Reward

PROMPTS = ["red", "red", "green", "green", "blue", "blue"]
LEVELS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
PROXY = {f"eval_proxy_reward{end}" for end in ("", "_std", "_low", "_high")}


class Brightness(Reward):
    name = "brightness"

    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Color(ImageJudge):
    """The amount of the named color; remembers the batches that it saw."""

    name = "alignment"

    def __init__(self) -> None:
        self.batches = []

    def score(self, images, prompts):
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.mean(dim=(2, 3))[range(len(prompts)), [["red", "green", "blue"].index(p) for p in prompts]]


class Contrast(PromptJudge):
    """The difference of a prompt's last image to its first."""

    name = "diversity"

    def of_prompt(self, image_set, rows):
        assert len({image_set.prompts[row] for row in rows}) == 1
        return float((image_set.images[rows[-1]] - image_set.images[rows[0]]).max())


def judges(*several):
    return Judges(several, Thumbnails())


@pytest.fixture
def images():
    """Each shows its prompt's color at a level of its own."""
    image_set = torch.zeros(6, 3, 4, 4)
    for index, level in enumerate(LEVELS):
        image_set[index, index // 2] = level
    return image_set


def test_values_and_intervals(images):
    found = evaluate_images(images, PROMPTS, Brightness(), judges(Color(), Contrast()))
    proxy = [level / 3 for level in LEVELS]
    assert found["eval_proxy_reward"] == pytest.approx(0.65 / 3)
    assert found["eval_proxy_reward_std"] == pytest.approx(torch.tensor(proxy).std().item())
    assert found["eval_alignment"] == pytest.approx(0.65)
    assert found["eval_alignment_shuffled"] == 0.0
    assert found["eval_diversity"] == pytest.approx((0.2 + 0.2 + 0.1) / 3)
    for name, values, groups in (
        ("proxy_reward", proxy, PROMPTS),
        ("alignment", list(LEVELS), PROMPTS),
        ("diversity", [0.2, 0.2, 0.1], ["red", "green", "blue"]),
    ):
        low, high = bootstrap_interval(values, groups)
        assert (found[f"eval_{name}_low"], found[f"eval_{name}_high"]) == pytest.approx((low, high))
        assert low < high


def test_means_of_each_prompt(images):
    found = {}
    evaluate_images(images, PROMPTS, Brightness(), judges(Color(), Contrast(), KernelDistance()), by_prompt=found)
    assert set(found) == {"proxy_reward", "alignment", "diversity"}
    assert found["alignment"] == pytest.approx([0.3, 0.7, 0.95])
    assert found["proxy_reward"] == pytest.approx([0.1, 0.7 / 3, 0.95 / 3])
    assert found["diversity"] == pytest.approx([0.2, 0.2, 0.1])


def test_batches_do_not_change_the_values(images):
    color = Color()
    found = evaluate_images(images, PROMPTS, Brightness(), judges(color), batch_size=4)
    assert found == evaluate_images(images, PROMPTS, Brightness(), judges(Color()))
    # Once under its own prompts, then under each of the two others.
    assert color.batches == [4, 2] * 3


def test_unknown_is_none(images):
    found = evaluate_images(images, PROMPTS, Brightness(), judges(KernelDistance()))
    assert {name for name, value in found.items() if value is not None} == PROXY
    assert {
        *("eval_true_reward", "eval_alignment", "eval_alignment_low", "eval_alignment_shuffled", "eval_diversity"),
        *("eval_attribute_accuracy", "eval_attribute_accuracy_high", "eval_vendi", "eval_distance_to_base"),
    } <= found.keys()


def test_one_prompt_has_no_shuffled_baseline(images):
    found = evaluate_images(images, ["red"] * 6, Brightness(), judges(Color()))
    assert found["eval_alignment_shuffled"] is None
    one = evaluate_images(images[:1], ["red"], Brightness(), judges(Contrast()))
    assert one["eval_proxy_reward_std"] == 0.0
    assert one["eval_diversity"] is None


def test_the_base_models_images_are_at_no_distance(images):
    several = judges(KernelDistance())
    base = several.embed(images, batch_size=4)
    same = evaluate_images(images, PROMPTS, Brightness(), several, base=base)
    assert (same["eval_distance_to_base"], same["eval_distance_to_base_low"]) == (0.0, 0.0)
    other = evaluate_images(1 - images, PROMPTS, Brightness(), several, base=base)
    assert other["eval_distance_to_base"] > 0.1


def test_reward_that_fails_is_refused(images):
    broken = FunctionReward(lambda x, p: x.mean(dim=(1, 2, 3)) / 0, "broken", {})
    with pytest.raises(UserError, match="'broken' returned"):
        evaluate_images(images, PROMPTS, broken, judges())


class Says(Judge):
    name = "oracle"

    def __init__(self, said):
        self.said = said

    def values(self, image_set):
        return self.said()


def test_judge_that_fails_is_refused(images):
    for said, message in (
        (lambda: 1 // 0, "judge 'oracle' raised ZeroDivisionError.*6 images .3, 4, 4."),
        (lambda: Values([float("nan")], ["red"]), "judge 'oracle' returned nan"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_images(images, PROMPTS, Brightness(), judges(Says(said)))


def test_memory_is_not_the_judges_fault(images):
    def full():
        raise torch.OutOfMemoryError("out")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate_images(images, PROMPTS, Brightness(), judges(Says(full)))


class Travelling(torch.nn.Linear):
    """Remembers where it was sent."""

    def __init__(self):
        super().__init__(1, 1)
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self


class Bias(ImageJudge):
    name = "alignment"

    def __init__(self):
        self.network = Travelling()

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) + self.network.bias


def test_a_judges_network_is_with_the_images_only_while_it_judges(images):
    bias = Bias()
    with bias.at(torch.device("cuda:1")):
        assert bias.network.places == ["cuda:1"]
    assert bias.network.places == ["cuda:1", "cpu"]
    found = evaluate_images(images, PROMPTS, Brightness(), judges(bias))
    assert found["eval_alignment"] == pytest.approx(0.65 / 3 + bias.network.bias.item())
    assert found["eval_alignment_shuffled"] == pytest.approx(found["eval_alignment"])
    # There and back for the images, and for the exchanged prompts.
    assert bias.network.places == ["cuda:1", *["cpu"] * 5]
