"""What the benchmark of a training step says of its predictions."""

from __future__ import annotations

import pytest
from cases.training_step.benchmark import verdicts


def row(implementation, predicted, device="cpu", fault=None):
    return {
        "op": "training_step",
        "implementation": implementation,
        "device": device,
        "size": "shapes",
        "fault": fault,
        "training_step_of_joint": None,
        "peak_bytes": 1000,
        "predicted_bytes": predicted,
    }


@pytest.mark.parametrize(
    ("device", "predicted", "met"),
    [
        *(("cpu", 1020, True), ("cpu", 980, True), ("cpu", 1021, False), ("cpu", 979, False)),
        *(("cuda", 1050, True), ("cuda", 950, True), ("cuda", 1051, False), ("cuda", 949, False)),
    ],
)
def test_a_prediction_is_within_its_bound_or_not(device, predicted, met):
    ((text, found),) = verdicts([row("staged", predicted, device)])
    assert found is met
    assert text.startswith(f"peak of staged on shapes: predicted {predicted / 10 - 100:+.1f}%, at most ")
    assert text.endswith(f"{2 if device == 'cpu' else 5}% off, {'met' if met else 'NOT MET'}")


def test_every_way_that_is_planned_has_a_verdict():
    rows = [
        row("published", None),
        row("joint", 990),
        row("staged", 1100),
        row("staged + checkpointing", 1, fault="wrong"),
    ]
    assert [(text.split()[2], met) for text, met in verdicts(rows)] == [("joint", True), ("staged", False)]
