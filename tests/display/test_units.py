from __future__ import annotations

import pytest

from sqdf_fast.display.units import format_against, format_bytes, format_duration, format_energy


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (12, "12 s"),
        (59.6, "1 min"),
        (75.2, "1 min 15 s"),
        (3599.7, "1 h"),
        (4000, "1 h 7 min"),
        (6510.2, "1 h 49 min"),
        (86399, "1 d"),
        (100_000, "1 d 4 h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (12, "12 B"),
        (2048, "2.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_format_against_has_the_unit_of_the_limit():
    assert format_against(2**29, 2**30, 2 * 2**30) == "now 0.5, peak 1.0 of 2.0 GiB"
    assert format_against(None, 2**29, 2**29) == "peak 512.0 of 512.0 MiB"


def test_format_energy():
    assert [format_energy(joules) for joules in (900.0, 1500.0)] == ["900 J", "1.5 kJ"]
