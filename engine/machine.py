"""What the system grants this process: cores, control groups, nodes of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path | str = "/") -> int:
    """Count the physical cores that this process may use.

    Two threads of one core share its arithmetic, so they count once. A control group's quota of
    processor time counts in whole cores: workers that wait for one that is held back all lose.

    Parameters
    ----------
    root : Path or str
        Where ``proc`` and ``sys`` are.
    """
    root = Path(root)
    cores = {_siblings(root, cpu) for cpu in os.sched_getaffinity(0)}
    quotas = [int(quota) for quota in _quotas(root)]
    return max(1, min([len(cores), *quotas]))


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's group and every one around it that have a controller's limits."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        mount = root / "sys/fs/cgroup"
        if number != "0" or controllers:
            if controller not in controllers.split(","):
                continue
            mount = mount / controller
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # A container sees its own group as the root of the mount, whatever the path says.
        for length in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:length])


def read_text(path: Path) -> str:
    """Read one of the system's files; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def nodes(root: Path | str = "/") -> list[str]:
    """List the processors of each node of memory, as in ``0-3,8-11``."""
    folders = Path(root, "sys/devices/system/node").glob("node[0-9]*")
    lists = [read_text(folder / "cpulist").strip() for folder in sorted(folders)]
    return [cpus for cpus in lists if cpus]


def cpus_of(listed: str) -> set[int]:
    """Read a list of processors such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def settle_on_nodes(strategy: str, root: Path | str = "/") -> str:
    """Place the process on a machine with several nodes of memory, before it makes threads.

    Parameters
    ----------
    strategy : str
        ``distribute``: threads spread evenly over all nodes; ``isolate``: only processors of the
        node that runs this; ``numactl``: as that program has set it.

    Returns
    -------
    str
        What was done.
    """
    every = nodes(root)
    if len(every) < 2:
        return "one node of memory, nothing to place"
    if strategy == "numactl":
        return "processors as the process was given them"
    if strategy == "isolate":
        allowed = os.sched_getaffinity(0)
        here = _running_on(Path(root))
        mine = next((cpus & allowed for cpus in map(cpus_of, every) if here in cpus), set())
        if mine:
            os.sched_setaffinity(0, mine)
        return f"processors of one node: {sorted(mine or allowed)}"
    # Read by the OpenMP runtime when it is loaded, which is when the first graph is made.
    os.environ["OMP_PLACES"] = ",".join("{" + cpus_to_places(cpus) + "}" for cpus in every)
    os.environ["OMP_PROC_BIND"] = "spread"
    return f"threads spread over {len(every)} nodes"


def cpus_to_places(listed: str) -> str:
    """Write a list of processors as the members of an OpenMP place."""
    return ",".join(map(str, sorted(cpus_of(listed))))


def _siblings(root: Path, cpu: int) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return read_text(topology / "thread_siblings_list").strip() or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that control groups grant, of versions 2 and 1."""
    for folder in control_groups(root, "cpu"):
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us").strip()
            period = read_text(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _running_on(root: Path) -> int:
    """Find the processor that runs this; its number stands behind the name in parentheses."""
    fields = read_text(root / "proc/self/stat").rpartition(")")[2].split()
    return int(fields[36]) if len(fields) > 36 else -1
