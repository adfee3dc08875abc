"""The page's own Python, run as it stands, and what the page says of torch.compile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from sqdf_fast import DenoisingSchedule, posterior_mean, sqdf_loss
from sqdf_fast.shapes import load_taste

PAGE = Path(__file__).parents[2] / "docs" / "use_only_the_loss.md"


@pytest.fixture(scope="module")
def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_snippets_run(snippets, load_example, load_pipeline):
    torch.manual_seed(0)
    pipe, prompts = load_pipeline(), ["a red star", "a blue ring"]
    parameters = load_example("callback").add_lora(pipe, rank=2)
    taste = load_taste()
    names = {
        "scheduler": DDPMScheduler.from_config(pipe.scheduler.config),
        "unet": pipe.unet,
        "text": pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0],
        "x0": torch.randn(2, 4, 16, 16),
        "decode": lambda latents: pipe.vae.decode(latents).sample / 2 + 0.5,
        "score": lambda images: taste(images, prompts),
        "noise": torch.randn(2, 4, 16, 16),
    }
    one_call, single_ops = snippets
    exec(one_call, names)
    result = names["result"]
    assert torch.equal(result.kl, torch.zeros(2))
    expected = -(0.9 ** names["schedule"].remaining(names["index"]) * result.reward).mean()
    torch.testing.assert_close(result.loss.detach(), expected)
    # B = 0 at the start: the gradient of A is 0, that of B is not.
    assert max(parameter.grad.abs().max() for parameter in parameters) > 0

    exec(single_ops, names)
    arguments = [names[name] for name in ("x", "policy", "reference", "schedule", "index", "reward")]
    together = sqdf_loss(*arguments, alpha=2.0, gamma=0.9, noise=names["noise"])
    torch.testing.assert_close(names["loss"], together.loss)
    torch.testing.assert_close(names["x_prev"], together.x_prev)


def test_the_loss_is_one_graph():
    schedule = DenoisingSchedule.from_scheduler(DDPMScheduler(clip_sample=False), 10).to("cpu")
    generator = torch.Generator().manual_seed(0)
    x, policy, reference, noise = torch.randn(4, 2, 4, 8, 8, generator=generator).unbind()
    index = torch.tensor([3, 5])

    def loss(policy):
        def reward(x_prev):
            return posterior_mean(x_prev, x_prev.tanh(), schedule.lookahead, index).mean(dim=(1, 2, 3))

        return sqdf_loss(x, policy, reference, schedule, index, reward, alpha=2.0, gamma=0.9, noise=noise).loss

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = policy.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0])
