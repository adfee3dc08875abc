from __future__ import annotations

from harness.machine import caches, device_name, last_level, machine_info


def test_what_is_kept_of_a_machine():
    info = machine_info()
    assert set(info) == {
        *("system", "cpu", "cores", "caches", "torch_threads", "native"),
        *("gpu", "gpu_memory_gib", "compute_capability", "driver", "cuda"),
        *("python", "torch", "triton", "pytest-benchmark", "sqdf-fast"),
    }
    assert info["torch"].startswith("2.")
    assert info["cores"] >= 1


def test_caches_are_read_by_name(tmp_path):
    for index, (level, kind, size) in enumerate([("1", "Data", "32K"), ("3", "Unified", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert caches(tmp_path) == {"L1 Data": "32K", "L3 Unified": "32768K"}
    assert caches(tmp_path / "missing") == {}


def test_the_last_level_is_the_one_behind_all_others():
    assert last_level({"L1 Data": "48K", "L3 Unified": "107520K", "L2 Unified": "2048K"}) == (
        "L3 Unified",
        107520 * 1024,
    )
    assert last_level({}) is None


def test_a_device_names_its_file(recorded):
    assert device_name(recorded["machine_info"], "cpu") == "cpu-some-cpu-r-9-2-cores"
    assert device_name(recorded["machine_info"], "cuda") == "some-gpu-80gb"
