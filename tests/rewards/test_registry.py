from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import Reward, load_reward, preflight
from sqdf_fast.rewards.base import FunctionReward

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_reward.md"


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module of the user's into the current folder and returns its name, a new one each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"rewards_of_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write


def test_function_of_the_user(user_module):
    name = user_module("def redness(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    reward = load_reward(f"{name}:redness")
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 0.5
    assert reward.name == f"{name}:redness"
    assert reward.differentiable
    assert reward(images, ["a", "b"]).tolist() == [0.0, 0.5]
    assert reward.features(images) is None


def test_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "found_in_the_current_folder.py").write_text(
        "def score(images, prompts):\n    return images.sum((1, 2, 3))\n"
    )
    reward = load_reward("found_in_the_current_folder:score")
    assert reward(torch.ones(1, 3, 2, 2), ["a"]).tolist() == [12.0]


def test_options_reach_the_function(user_module):
    name = user_module("def scaled(images, prompts, factor=1.0):\n    return images.mean((1, 2, 3)) * factor\n")
    assert load_reward(f"{name}:scaled", factor=3.0)(torch.ones(1, 3, 2, 2), ["a"]).tolist() == [3.0]
    with pytest.raises(UserError, match=r"unexpected keyword argument 'facto'.*options given: facto"):
        load_reward(f"{name}:scaled", facto=3.0)


def test_class_of_the_user(user_module):
    name = user_module(
        "import torch\n"
        "from sqdf_fast.rewards import Reward\n"
        "class Linear(Reward):\n"
        "    name = 'linear'\n"
        "    def __init__(self, bias, dtype):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 1, dtype=dtype)\n"
        "        torch.nn.init.constant_(self.layer.weight, 2.0)\n"
        "        torch.nn.init.constant_(self.layer.bias, bias)\n"
        "    def forward(self, images, prompts):\n"
        "        return self.layer(images.mean((2, 3))).squeeze(1)\n"
    )
    reward = load_reward(f"{name}:Linear", dtype=torch.float64, bias=0.5)
    assert isinstance(reward, Reward)
    assert not reward.training
    assert [parameter.requires_grad for parameter in reward.parameters()] == [False, False]
    assert reward(torch.ones(1, 3, 2, 2, dtype=torch.float64), ["a"]).tolist() == [6.5]
    with pytest.raises(UserError, match="missing a required argument: 'bias'"):
        load_reward(f"{name}:Linear")


def test_class_that_cannot_be_made(user_module):
    name = user_module(
        "from sqdf_fast.rewards import Reward\n"
        "class Fails(Reward):\n"
        "    def __init__(self):\n"
        "        raise OSError('no weights')\n"
    )
    with pytest.raises(UserError, match=r"cannot be made \(OSError: no weights\)"):
        load_reward(f"{name}:Fails")


def test_function_may_say_that_it_has_no_gradient(user_module):
    name = user_module(
        "def size(images, prompts):\n    return images.detach().sum((1, 2, 3))\nsize.differentiable = False\n"
    )
    reward = load_reward(f"{name}:size")
    assert not reward.differentiable
    with pytest.raises(UserError, match="has no gradient"):
        preflight(reward, torch.ones(1, 3, 2, 2), ["a"])


def test_unknown_name_suggests_and_lists():
    with pytest.raises(
        UserError,
        match=r"'asthetic' is unknown; did you mean 'aesthetic'.*jpeg, .*module:function.*or a sum such as aesthetic",
    ):
        load_reward("asthetic")
    with pytest.raises(UserError, match="'xyz' is unknown; allowed: aesthetic"):
        load_reward("xyz")


def test_module_that_is_not_there():
    with pytest.raises(
        UserError, match=r"'no_such_module' cannot be imported .*put no_such_module\.py in the current folder"
    ):
        load_reward("no_such_module:score")


def test_module_that_fails(user_module):
    name = user_module("raise RuntimeError('weights missing')\n")
    with pytest.raises(UserError, match=r"cannot be imported \(RuntimeError: weights missing\)"):
        load_reward(f"{name}:score")


def test_attribute_that_is_not_there(user_module):
    name = user_module("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    with pytest.raises(UserError, match=f"module {name} has no 'brightnes'; did you mean 'brightness'"):
        load_reward(f"{name}:brightnes")


@pytest.mark.parametrize("source", ["score = 3", "class score:\n    pass"])
def test_attribute_that_is_no_reward(user_module, source):
    name = user_module(source + "\n")
    with pytest.raises(UserError, match="is neither a function nor a subclass of"):
        load_reward(f"{name}:score")


def test_documented_example_works(user_module):
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    name = user_module(source)
    reward = load_reward(f"{name}:pastel", target=0.5)
    images = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.9)])
    assert reward(images, ["a", "b"]).tolist() == pytest.approx([0.0, -0.16], abs=1e-6)
    preflight(reward, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b"])


def test_documented_example_works_in_a_sum(user_module):
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    name = user_module(source)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    summed = load_reward(f"{name}:pastel*0.5 + warmth", **{f"{name}:pastel.target": 0.5})
    parts = load_reward(f"{name}:pastel", target=0.5), load_reward("warmth")
    prompts = ["a", "b"]
    torch.testing.assert_close(summed(images, prompts), 0.5 * parts[0](images, prompts) + parts[1](images, prompts))
    preflight(summed, images, prompts)


def test_documented_faults_are_the_messages():
    table = DOCUMENT.read_text(encoding="utf-8").split("| wrong |")[1].split("## ")[0]
    begin = [line.split("|")[2].strip().strip("`") for line in table.splitlines() if line.startswith("| ")]
    faults = {
        "returned shape [4, 1] for 4 images": lambda x, p: x.mean((2, 3))[:, :1],
        "returned torch.int64": lambda x, p: x.mean((1, 2, 3)).long(),
        "returned scores that are detached from the images": lambda x, p: x.detach().mean((1, 2, 3)),
        "raised RuntimeError: ...": lambda x, p: x @ torch.ones(3),
        "returned nan for the prompt '...'": lambda x, p: x.mean((1, 2, 3)) * float("nan"),
        "has a gradient of zero at every pixel": lambda x, p: x.clamp(min=2.0).mean((1, 2, 3)),
    }
    assert set(faults) == set(begin) - {"returned scores on cpu for images on cuda:0"}
    for line, function in faults.items():
        with pytest.raises(UserError) as caught:
            preflight(FunctionReward(function, "mine", {}), torch.rand(4, 3, 5, 5), ["..."] * 4)
        assert str(caught.value).startswith(f"reward 'mine' {line.removesuffix('...')}")
