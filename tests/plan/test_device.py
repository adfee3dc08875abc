"""GPUs and sizes."""

from __future__ import annotations

import pytest

from sqdf_fast.errors import UserError
from sqdf_fast.plan.device import DEVICES, GIB, find_device, parse_memory, reserve_bytes
from sqdf_fast.plan.memory import StageCount


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24G", 24 * GIB),
        ("8GiB", 8 * GIB),
        ("24000M", 24000 * 2**20),
        ("1.5 gb", 3 * GIB // 2),
        ("1073741824", GIB),
        ("80%", 8 * GIB),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_memory(text, total=10 * GIB) == size


@pytest.mark.parametrize(
    ("text", "total", "message"),
    [
        ("lots", None, "invalid --vram 'lots': expected a size such as 24G"),
        ("24 apples", None, "expected a size such as 24G, 8GiB or 80%"),
        ("-3G", None, "expected a size such as 24G, 8GiB or 80%"),
        ("0G", None, "expected more than nothing"),
        ("80%", None, "no GPU to take a share of"),
        ("120%", GIB, "more than 0% and at most 100%"),
        ("0%", GIB, "more than 0% and at most 100%"),
        ("", None, "expected a size such as 24G, 8GiB or 80%"),
    ],
)
def test_an_invalid_size_is_refused(text, total, message):
    with pytest.raises(UserError, match=message):
        parse_memory(text, total)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla T4", "T4"),
        ("4090", "RTX 4090"),
    ],
)
def test_devices_are_found_by_cudas_name(name, found):
    assert find_device(name, 8 * GIB).name == found


@pytest.mark.parametrize(("gib", "found"), [(8, "RTX 4060"), (12, "RTX 3060"), (24, "RTX 4090"), (500, "H200")])
def test_a_size_alone_means_a_common_card(gib, found):
    assert find_device(None, gib * GIB).name == found
    assert find_device("a card of the future", gib * GIB).name == found


def test_time_is_the_slower_of_arithmetic_and_memory_plus_launches():
    device = DEVICES["RTX 4090"]
    assert device.seconds(StageCount(flops=10**15)) == pytest.approx(1e15 / (165.2e12 * 0.45))
    assert device.seconds(StageCount(flops=1, matrix_bytes=10**12)) == pytest.approx(1e12 / (1008e9 * 0.8))
    assert device.seconds(StageCount(operators=1000)) == pytest.approx(4e-3)
    assert device.upload_seconds(31_500_000_000) == pytest.approx(1 / 0.8)


def test_the_reserve_is_the_context_and_a_share_for_fragmentation():
    assert reserve_bytes(10 * GIB) == 614 * 2**20 + GIB // 2
    assert reserve_bytes(10 * GIB, find_device("CPU", 0)) == 0
