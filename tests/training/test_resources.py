"""What a machine has left, from files as systems write them, and what a run needs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import EngineError
from engine.training.resources import (
    MemoryLimit,
    available_memory,
    check_memory,
    expected_updates,
    least_memory,
    memory_in_use,
    planned_memory,
    probe_seconds,
    size_text,
)

MEMINFO = "MemTotal:       24000000 kB\nMemAvailable:    2000000 kB\nSwapFree:      0 kB\n"
MACHINE = MemoryLimit(2_000_000 * 1024, "the machine")


def make(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_without_control_groups_the_machine_is_the_limit(tmp_path):
    assert available_memory(make(tmp_path, {"proc/meminfo": MEMINFO})) == MACHINE


def test_a_system_that_tells_nothing_sets_no_limit(tmp_path):
    assert available_memory(tmp_path) is None
    check_memory(2**60, None, {})


def test_this_machine_has_some_memory_and_this_process_uses_some():
    limit = available_memory()
    assert limit is not None and limit.n_bytes > 0
    assert 1 << 20 < memory_in_use() < 1 << 36


def v2(folder, most, used, inactive=0):
    return {
        f"{folder}/memory.max": f"{most}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def test_a_group_of_version_2_limits_with_what_it_can_reclaim_counted_as_free(tmp_path):
    make(tmp_path, {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user/job\n",
        **v2("sys/fs/cgroup/user/job", 1000, 900, 300),
        **v2("sys/fs/cgroup/user", "max", 5000),
    })  # fmt: skip
    assert available_memory(tmp_path) == MemoryLimit(400, "the control group")


def test_an_outer_group_may_be_narrower(tmp_path):
    make(tmp_path, {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user/job\n",
        **v2("sys/fs/cgroup/user/job", 10_000, 900),
        **v2("sys/fs/cgroup/user", 2000, 1950),
    })  # fmt: skip
    assert available_memory(tmp_path) == MemoryLimit(50, "the control group")


def test_a_container_finds_its_group_at_the_root_of_the_mount(tmp_path):
    make(tmp_path, {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/docker/0123\n",
        **v2("sys/fs/cgroup", 1000, 200),
    })  # fmt: skip
    assert available_memory(tmp_path) == MemoryLimit(800, "the control group")


def test_a_group_of_version_1_limits(tmp_path):
    folder = "sys/fs/cgroup/memory/job"
    make(tmp_path, {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "9:name=systemd:/\n5:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
        f"{folder}/memory.limit_in_bytes": "5000\n",
        f"{folder}/memory.usage_in_bytes": "4500\n",
        f"{folder}/memory.stat": "cache 3\ntotal_inactive_file 100\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "77\n",
    })  # fmt: skip
    assert available_memory(tmp_path) == MemoryLimit(600, "the control group")


def test_a_group_without_limit_leaves_the_machines(tmp_path):
    make(tmp_path, {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job\n",
        **v2("sys/fs/cgroup/job", "max", 900),
    })  # fmt: skip
    assert available_memory(tmp_path) == MACHINE


def test_a_group_beyond_its_limit_has_nothing_left(tmp_path):
    make(tmp_path, {"proc/self/cgroup": "0::/job\n", **v2("sys/fs/cgroup/job", 1000, 1200)})
    assert available_memory(tmp_path) == MemoryLimit(0, "the control group")


def test_a_plan_that_does_not_fit_is_refused_with_both_numbers():
    limit = MemoryLimit(3 << 30, "the machine")
    check_memory(3 << 30, limit, {})
    with pytest.raises(EngineError) as caught:
        check_memory((3 << 30) + 1, limit, {"--batch": 8, "--ctx": 128}, " or sell the ledger")
    assert str(caught.value) == (
        "training needs 3.0 GB of memory, the machine has 3.0 GB left; lower --batch (8),"
        " --ctx (128) or sell the ledger"
    )


def test_a_plan_holds_activations_and_the_parameters_companions():
    trainer = SimpleNamespace(
        memory_bytes=1000, input_bytes=20, work_bytes=300, grad=np.zeros(25, np.float32)
    )
    # Gradient, two moments, and the copy of a save.
    assert planned_memory(trainer) == 1320 + 4 * 100


def test_the_least_memory_grows_with_each_of_its_causes():
    sizes = SimpleNamespace(n_embd=64, n_ff=192, n_layer=2, head_dim=16)
    least = least_memory(sizes, 2, 16, 1000)
    assert least >= 4 * 2 * 16 * 64 * 2
    assert least_memory(sizes, 4, 16, 1000) > least
    assert least_memory(sizes, 2, 32, 1000) > least
    assert least_memory(sizes, 2, 16, 2000) > least


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0.0 MB"), (1536 * 1024, "1.5 MB"), (5 << 29, "2.5 GB")]
)
def test_sizes_are_written(n_bytes, text):
    assert size_text(n_bytes) == text


def test_a_short_probe_is_taken_twice_and_a_long_one_once():
    times = iter([0.0, 1.5, 1.5, 2.0])
    assert probe_seconds(lambda: None, lambda: next(times)) == 0.5
    times = iter([0.0, 7.0])
    assert probe_seconds(lambda: None, lambda: next(times)) == 7.0


@pytest.mark.parametrize(
    ("adam_iter", "epochs", "n_samples", "at_once", "expected"),
    [(256, -1, 10, 4, 256), (256, 0, 10, 4, 256), (256, 2, 10, 4, 5), (3, 2, 10, 4, 3),
     (256, 1, 3, 8, 1)],
)  # fmt: skip
def test_updates_end_with_the_iterations_or_the_epochs(
    adam_iter, epochs, n_samples, at_once, expected
):
    assert expected_updates(adam_iter, epochs, n_samples, at_once) == expected
