"""How many worker processes, and how many children at a time, suit this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_JAX_SHARE = 0.15  # of the cores is left to JAX's host threads, at least _JAX_CORES
_JAX_CORES = 2
WORKERS_PER_BROKER = 8  #: one core's worth of broker can feed about this many (docs/executor.md, "Many cores")
_MEMORY_SHARE = 0.5  # of the machine's memory that all children together could take


def usable_cores() -> int:
    """Cores this process may use: CPU affinity, capped by the cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.floor(quota)))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of CPU time that this process's cgroups allow, the tightest one; None if nothing limits it.

    Reads cgroup v2 (`cpu.max`) from the process's group up to the root, and v1 (`cpu.cfs_quota_us`).
    """
    quotas = []
    for folder in cgroup_folders(cgroup, process, "cpu"):
        limit, _, period = read_text(folder / "cpu.max").partition(" ")
        if not limit:
            limit, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        if limit.isdecimal() and period.isdecimal():  # no limit is "max" in v2 and -1 in v1
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def cgroup_folders(root: Path, process: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's cgroups for a controller, from its own up to the root, v2 and v1."""
    for line in read_text(process).splitlines():
        number, names, path = (line.split(":", 2) + ["", ""])[:3]
        if number != "0" and controller not in names.split(","):
            continue
        base = root if number == "0" else root / controller
        folder = base / path.lstrip("/")
        yield folder
        while folder != base:
            folder = folder.parent
            yield folder


def read_text(path: Path) -> str:
    """A small file's text, "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def default_workers(beside_jax: bool = True) -> int:
    """Workers for `executor.workers: 0`: the usable cores less those JAX needs, at least one."""
    cores = usable_cores()
    return max(1, cores - max(_JAX_CORES, math.ceil(_JAX_SHARE * cores))) if beside_jax else cores


def broker_shares(workers: int) -> list[int]:
    """Workers of each broker: as few brokers as keep each at WORKERS_PER_BROKER or less, shared out evenly."""
    brokers = math.ceil(workers / WORKERS_PER_BROKER)
    return [workers // brokers + (number < workers % brokers) for number in range(brokers)]


def max_children(workers: int, memory_mb: int) -> int:
    """Children alive at once, slow ones included, so that their limits together stay within a share of memory."""
    try:
        total_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError):
        total_mb = 8192.0
    return max(2 * workers, min(8 * workers + 24, int(_MEMORY_SHARE * total_mb / memory_mb)))
