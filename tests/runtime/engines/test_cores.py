from __future__ import annotations

import os
from pathlib import Path

import pytest

from regraft.engines import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four hardware threads on two cores, no limits."""
    for cpu in range(4):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    (tmp_path / "cgroup/cpu").mkdir(parents=True)
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path


def test_two_threads_of_a_core_count_once(machine: Path) -> None:
    assert cores.usable_cores() == 2


def test_affinity_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3})
    assert cores.usable_cores() == 1


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("max 100000", 2), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1)],
)
def test_a_quota_of_cgroups_2_counts(machine: Path, cpu_max: str, expected: int) -> None:
    (machine / "cgroup/cpu.max").write_text(cpu_max)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 2), ("50000", 1), ("200000", 2)])
def test_a_quota_of_cgroups_1_counts(machine: Path, quota: str, expected: int) -> None:
    (machine / "cgroup/cpu/cpu.cfs_quota_us").write_text(quota)
    (machine / "cgroup/cpu/cpu.cfs_period_us").write_text("100000")
    assert cores.usable_cores() == expected


def test_without_topology_every_cpu_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_TOPOLOGY", machine / "missing")
    assert cores.usable_cores() == 4
