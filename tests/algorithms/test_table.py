"""The setting and the table name the same algorithms."""

from __future__ import annotations

from typing import get_args

from sqdf_fast.algorithms import ALGORITHMS
from sqdf_fast.config import Config


def test_every_algorithm_that_may_be_set_is_there():
    assert set(ALGORITHMS) == set(get_args(Config.model_fields["algorithm"].annotation))


def test_those_that_ask_for_no_gradient():
    assert {name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_gradient} == {"ddpo", "dpok", "awm"}
