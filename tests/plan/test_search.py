"""What is extrapolated from a small batch, against the full batch simulated."""

from __future__ import annotations

import pytest
from support.marks import slow

from sqdf_fast.config import Execution, make_config, with_settings
from sqdf_fast.engine.module_groups import ALL_GROUPS
from sqdf_fast.plan import Planner
from sqdf_fast.plan.search import Choice, simulate_full_batch

BATCH = 5
CONFIG = with_settings(make_config("shapes"), {"optimizer.batch_size": BATCH})
EXECUTIONS = {
    "staged": Execution(
        forward_batch_rows=1, backward_batch_rows=1, gradient_checkpointing=ALL_GROUPS, offload="staged"
    ),
    "joint": Execution(executor="joint", micro_batch=1),
}


@pytest.fixture(scope="module")
def simulation():
    return Planner(CONFIG, use_cache=False).simulation()


@pytest.mark.parametrize("name", [slow("staged"), "joint"])
def test_a_small_batch_extrapolated_is_the_full_batch(simulation, name):
    execution = EXECUTIONS[name]
    settings = {f"execution.{key}": value for key, value in execution.model_dump().items()}
    settings |= {"optimizer.states": "device", "sampling.batch_size": 1, "sampling.merge_lora": False}
    extrapolated = simulate_full_batch(simulation, Choice(settings, {}, {}), CONFIG)
    exact = simulation.run(execution, BATCH, sampled=1, merged=False, optimizer=CONFIG.optimizer)
    assert extrapolated.samples == BATCH
    for stage, counted in exact.stages.items():
        found = extrapolated.stages[stage]
        assert found.peak_bytes == counted.peak_bytes, stage
        assert found.flops == counted.flops, stage
        # The first chunk's gradients are kept, later ones are added to them.
        assert found.operators == pytest.approx(counted.operators, rel=0.04), stage
