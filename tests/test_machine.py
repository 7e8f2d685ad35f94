"""What the system grants: read from folders that look like its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import machine
from engine.machine import cpus_of, nodes, settle_on_nodes, usable_cores


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processors that the process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def siblings(*pairs: str) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": pair + "\n"
        for pair in pairs
        for cpu in cpus_of(pair)
    }


def test_two_threads_of_a_core_count_once(four, tmp_path) -> None:
    assert usable_cores(put(tmp_path, siblings("0,2", "1,3"))) == 2
    assert usable_cores(put(tmp_path, siblings("0", "1", "2", "3"))) == 4


def test_without_the_systems_word_every_processor_counts(four, tmp_path) -> None:
    assert usable_cores(tmp_path) == 4


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("300000 100000", 3), ("150000 100000", 1), ("50000 100000", 1),
     ("900000 100000", 4), ("", 4), ("x y", 4), ("100000 0", 4)],
)  # fmt: skip
def test_a_quota_counts_in_whole_cores(quota, cores, four, tmp_path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": quota + "\n"}
    assert usable_cores(put(tmp_path, files)) == cores


def test_quotas_of_version_1_count_too(four, tmp_path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/box\n3:memory:/box\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    }
    assert usable_cores(put(tmp_path, files)) == 2
    (tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(tmp_path) == 4


def test_lists_of_processors_are_read() -> None:
    assert cpus_of("0-2,5") == {0, 1, 2, 5}
    assert cpus_of("") == set()


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    stat = "1 (a) b) " + " ".join(["0"] * 36) + " 2 0"
    return put(tmp_path, {
        "sys/devices/system/node/node0/cpulist": "0-1\n",
        "sys/devices/system/node/node1/cpulist": "2-3\n",
        "proc/self/stat": stat,
    })  # fmt: skip


def test_on_one_node_nothing_is_placed(tmp_path) -> None:
    assert settle_on_nodes("isolate", tmp_path) == "one node of memory, nothing to place"


def test_isolation_keeps_the_processors_of_the_node_that_runs(four, two_nodes, monkeypatch) -> None:
    kept: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: kept.append(cpus))
    assert nodes(two_nodes) == ["0-1", "2-3"]
    assert settle_on_nodes("isolate", two_nodes) == "processors of one node: [2, 3]"
    assert kept == [{2, 3}]


def test_threads_are_spread_over_nodes_by_the_runtime(two_nodes, monkeypatch) -> None:
    monkeypatch.setattr(machine.os, "environ", {})
    assert settle_on_nodes("distribute", two_nodes) == "threads spread over 2 nodes"
    assert machine.os.environ == {"OMP_PLACES": "{0,1},{2,3}", "OMP_PROC_BIND": "spread"}
    assert settle_on_nodes("numactl", two_nodes) == "processors as the process was given them"
