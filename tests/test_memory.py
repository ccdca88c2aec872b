"""How much memory is free, by what limits it."""

from __future__ import annotations

import psutil
import torch

from sppo.memory import free_memory, free_ram, give_back, keep_memory, measure_peak, peak_memory


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_container_s_limit_of_version_2_counts(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    files = {"memory__current": 600_000, "memory__stat": "anon 1\ninactive_file 100000"}
    group(tmp_path / "outer", memory__max=1_000_000, **files)
    group(tmp_path / "outer" / "inner", memory__max="max", **files)
    assert free_ram(tmp_path, membership) == 500_000  # files in the cache can go


def test_a_container_s_limit_of_version_1_counts(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/job\n")
    group(
        tmp_path / "memory" / "job", memory__limit_in_bytes=2_000_000, memory__usage_in_bytes=500_000,
        memory__stat="total_inactive_file 50000",
    )  # fmt: skip
    assert free_ram(tmp_path, membership) == 1_550_000
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert abs(free_ram(tmp_path, membership) - psutil.virtual_memory().available) < 2**30


def test_without_control_groups_it_is_what_the_machine_has(tmp_path):
    assert abs(free_ram(tmp_path, tmp_path / "none") - psutil.virtual_memory().available) < 2**30
    assert free_memory(torch.device("cpu")) <= psutil.virtual_memory().total


def test_what_was_freed_between_what_is_in_use_goes_back():
    keep_memory(2**34)
    blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
    kept = blocks[::10]
    del blocks
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 100 * 2**20
    assert all(float(block.sum()) == 2**18 for block in kept)


def test_the_peak_is_of_what_was_held_since_it_is_measured():
    cpu = torch.device("cpu")
    torch.ones(2**28 // 4)  # 256 MiB, held and freed before
    give_back()
    measure_peak(cpu)
    before = peak_memory(cpu)
    assert before < psutil.Process().memory_info().rss + 64 * 2**20
    torch.ones(2**29 // 4)
    give_back()
    assert before + 400 * 2**20 < peak_memory(cpu) < before + 700 * 2**20
