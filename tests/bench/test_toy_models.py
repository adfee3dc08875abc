"""Models that are measured on a GPU alone run here in toy sizes: the same classes, bfloat16, random weights."""

from __future__ import annotations

import pytest
import torch
from cases.training_step import setups
from cases.training_step.benchmark import BENCHMARK, group
from cases.training_step.measure import parity
from cases.training_step.problem import WAYS, parity_problem, problem
from harness.benchmark import measure

from sqdf_fast.families.stable_diffusion import StableDiffusion
from sqdf_fast.families.stable_diffusion_xl import StableDiffusionXL


@pytest.mark.parametrize(("model", "kind"), [("sd15", StableDiffusion), ("sdxl", StableDiffusionXL)])
def test_the_model_is_its_class_made_narrow(model, kind):
    ours = setups.Ours(problem(model, "cpu", toy=True))
    assert type(ours.family) is kind
    assert ours.family.latent_shape == (4, 8, 8)
    assert {p.dtype for p in ours.family.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    # The published LCM-LoRAs' rank, beside the policy's.
    ranks = {name: config.r for name, config in ours.family.network.peft_config.items()}
    assert ranks == {"policy": 4, "consistency": 64}
    assert not ours.family.text_encoders


@pytest.mark.slow
def test_every_way_has_the_gradient_of_sd15():
    judged = parity_problem(problem("sd15", "cuda"))
    assert (judged.device, judged.dtype, judged.toy) == ("cuda", torch.float64, True)
    judged = parity_problem(problem("sd15", "cpu"))
    faults, errors = parity(judged, setups.make(judged))
    assert faults == {}
    assert tuple(errors) == WAYS
    assert max(errors.values()) < 1e-9


@pytest.mark.slow
def test_sdxl_is_measured_in_bfloat16():
    rows = measure(BENCHMARK, group(problem("sdxl", "cpu", toy=True)), toy=True).rows
    assert tuple(rows) == WAYS
    for row in rows.values():
        assert row["fault"] is None
        assert row["gradient_error"] < 1e-9
        assert (row["dtype"], row["toy"]) == ("bfloat16", True)
        assert row["utilisation"] == row["flops_per_second"] / row["best_flops_per_second"]
    assert rows["joint"]["flops"] < rows["published"]["flops"]
    assert rows["staged + checkpointing"]["peak_bytes"] < rows["published"]["peak_bytes"]
    assert all(rows[name]["predicted_bytes"] for name in WAYS[1:])
